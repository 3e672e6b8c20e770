"""The short depthwise causal convolution in front of a Mamba scan, followed by SiLU.

On a CPU torch's own depthwise convolutions take 1.4 (conv1d) to 1.8 times (conv2d) as long as K shifted multiply-adds over (B, T, C)
(benchmarks/results/conv.md), so it is written as those, with its backward by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, K) to contiguous (K, C): a strided tap would make every multiply-add slower."""
    return weight[:, 0].t().contiguous()


@torch.library.custom_op("hybridlm::causal_conv", mutates_args=())
def _causal_conv(padded: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """silu(convolution) and the convolution itself, both (B, T, C), of padded (B, T + K - 1, C)."""
    taps = _taps(weight)
    length = padded.shape[1] - len(taps) + 1
    out = torch.addcmul(bias, padded[:, :length], taps[0])
    for k in range(1, len(taps)):
        out.addcmul_(padded[:, k : k + length], taps[k])
    return torch.nn.functional.silu(out), out


@_causal_conv.register_fake
def _(padded: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, channels = padded.shape[0], padded.shape[1] - weight.shape[-1] + 1, padded.shape[2]
    return padded.new_empty(batch, length, channels), padded.new_empty(batch, length, channels)


@torch.library.custom_op("hybridlm::causal_conv_backward", mutates_args=())
def _causal_conv_backward(dy: Tensor, padded: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    taps = _taps(weight)
    length = out.shape[1]
    dout = torch.ops.aten.silu_backward(dy, out)
    dpadded, dtaps = torch.zeros_like(padded), torch.empty_like(taps)
    for k in range(len(taps)):
        dpadded[:, k : k + length].addcmul_(dout, taps[k])
        dtaps[k] = (dout * padded[:, k : k + length]).sum((0, 1))
    return dpadded, dtaps.t().unsqueeze(1).contiguous(), dout.sum((0, 1))


@_causal_conv_backward.register_fake
def _(dy: Tensor, padded: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(padded), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    padded, weight, out = ctx.saved_tensors  # type: ignore[attr-defined]
    grads: tuple[Tensor, ...] = _causal_conv_backward(dy.contiguous(), padded, weight, out)
    return grads


_causal_conv.register_autograd(_backward, setup_context=_setup)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``out[t] = silu(bias + sum_k weight[k] x[t - K + 1 + k])``, where x before the first token is ``state`` (zeros if None).

    x: (B, T, C); weight: (C, 1, K) as torch's Conv1d keeps it; bias: (C,); state: (B, K - 1, C), oldest first.
    Returns the output (B, T, C) and the new state, the last K - 1 inputs. Weight and bias are used in x's dtype.
    """
    before = x.new_zeros(x.shape[0], weight.shape[-1] - 1, x.shape[2]) if state is None else state.to(x.dtype)
    padded = torch.cat((before, x), dim=1)
    out = _causal_conv(padded, weight.to(x.dtype), bias.to(x.dtype))[0]
    return out, padded[:, x.shape[1] :]

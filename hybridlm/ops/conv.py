"""The short depthwise causal convolution in front of a Mamba scan, followed by SiLU.

On a CPU torch's own depthwise convolutions take 3.3 (conv1d) to 3.7 times (conv2d) as long as K shifted multiply-adds
over (B, T, C) (benchmarks/results/conv.md), so it is written as those, with its backward by hand.

With packed documents only the first K - 1 tokens of each have taps outside their document. These few are recomputed
tap by tap, instead of masking every tap of all tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.ops.dispatch import called, new_like
from hybridlm.ops.kernels.choice import CUDA, TORCH, Backend
from hybridlm.ops.kernels.rules import conv_refusal
from hybridlm.ops.norm import as_dtype
from hybridlm.ops.padding import after_padding


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, K) to contiguous (K, C): strided taps would slow every multiply-add."""
    return weight[:, 0].t().contiguous()


class _Young(NamedTuple):
    """The n tokens less than K - 1 tokens after the beginning of their document."""

    row: Tensor  # (n,)
    time: Tensor  # (n,)
    place: Tensor  # (n, 1) position in the document

    @staticmethod
    def find(positions: Tensor, width: int) -> _Young:
        row, time = (positions < width - 1).nonzero().unbind(1)
        return _Young(row, time, positions[row, time].unsqueeze(1))

    def inputs(self, x: Tensor, before: Tensor | None, lag: int) -> Tensor:
        """(n, C): the inputs ``lag`` tokens earlier; zero outside the document."""
        source = x[self.row, (self.time - lag).clamp_min(0)]
        if before is not None and before.shape[1]:
            earlier = before[self.row, (before.shape[1] + self.time - lag).clamp(0, before.shape[1] - 1)]
            source = torch.where((self.time < lag).unsqueeze(1), earlier, source)
            return torch.where(self.place < lag, 0.0, source)
        return torch.where((self.place < lag) | (self.time < lag).unsqueeze(1), 0.0, source)


@torch.library.custom_op("hybridlm::causal_conv", mutates_args=())
def _causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """silu(convolution) and the convolution itself, both (B, T, C). before: (B, K - 1, C), the inputs before x; None:
    zeros."""
    taps, length = _taps(weight), x.shape[1]
    last = len(taps) - 1
    out = torch.addcmul(bias, x, taps[last])
    for lag in range(1, last + 1):
        out[:, lag:].addcmul_(x[:, : max(length - lag, 0)], taps[last - lag])
        if before is not None:
            out[:, :lag].addcmul_(before[:, last - lag : last - lag + length], taps[last - lag])
    if positions is not None:
        young = _Young.find(positions, len(taps))
        again = torch.addcmul(bias, x[young.row, young.time], taps[last])
        for lag in range(1, last + 1):
            again.addcmul_(young.inputs(x, before, lag), taps[last - lag])
        out[young.row, young.time] = again
    return torch.nn.functional.silu(out), out


_causal_conv.register_fake(lambda x, weight, bias, before, positions: tuple(new_like(x, x)))


@torch.library.custom_op("hybridlm::causal_conv_backward", mutates_args=())
def _causal_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, before: Tensor | None, positions: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the K - 1 inputs before x and of x in one (B, K - 1 + T, C), of weight and of bias."""
    taps, length = _taps(weight), x.shape[1]
    last = len(taps) - 1
    dout = torch.ops.aten.silu_backward(dy, out)
    dbias, dtaps = dout.sum((0, 1)), torch.zeros_like(taps)
    dline = x.new_zeros(x.shape[0], last + length, x.shape[2])
    torch.mul(dout, taps[last], out=dline[:, last:])
    dtaps[last] = (dout * x).sum((0, 1))
    if positions is not None:
        young = _Young.find(positions, len(taps))
        dyoung = dout[young.row, young.time]
        dout[young.row, young.time] = 0.0
        for lag in range(1, last + 1):
            dtaps[last - lag] += (young.inputs(x, before, lag) * dyoung).sum(0)
            counted = torch.where(young.place < lag, 0.0, dyoung * taps[last - lag])
            dline.index_put_((young.row, last + young.time - lag), counted, accumulate=True)
    for lag in range(1, last + 1):
        k, paired = last - lag, max(length - lag, 0)
        dline[:, k : k + length].addcmul_(dout, taps[k])
        dtaps[k] += (dout[:, lag:] * x[:, :paired]).sum((0, 1))
        if before is not None:
            dtaps[k] += (dout[:, :lag] * before[:, k : k + length]).sum((0, 1))
    return dline, dtaps.t().unsqueeze(1).contiguous(), dbias


_causal_conv_backward.register_fake(
    lambda dy, x, weight, before, positions, out: (
        x.new_empty(x.shape[0], weight.shape[-1] - 1 + x.shape[1], x.shape[2]),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
    )
)


def _setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]
) -> None:
    x, weight, _, before, positions = inputs
    ctx.save_for_backward(x, weight, before, positions, output[1])  # type: ignore[arg-type]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor | None, dout: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    x, weight, before, positions, out = ctx.saved_tensors  # type: ignore[attr-defined]  # read once: activation checkpointing recomputes them
    dline, dweight, dbias = _causal_conv_backward(dy.contiguous(), x, weight, before, positions, out)
    front = weight.shape[-1] - 1
    return dline[:, front:], dweight, dbias, None if before is None else dline[:, :front], None


_causal_conv.register_autograd(_backward, setup_context=_setup)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    padding: Tensor | None = None,
    backend: Backend = TORCH,
) -> tuple[Tensor, Tensor]:
    """``out[t] = silu(bias + sum_k weight[k] x[t - K + 1 + k])``, where x before the first token is ``state`` (zeros if
    None).

    x: (B, T, C); weight: (C, 1, K) as torch's Conv1d keeps it; bias: (C,); state: (B, K - 1, C), oldest first.
    positions: (B, T) position of each token in its document, beyond which the convolution does not look back; None:
    one document. padding: (B,) columns of left padding: the state precedes the first token, and padding's own output is
    zero. Returns the output (B, T, C) and the new state, the last K - 1 inputs.
    ``backend`` TORCH casts weight and bias to x's dtype; CUDA, the compiled kernel, keeps theirs and is used for more
    than one token.
    """
    front = weight.shape[-1] - 1
    if backend == CUDA and x.shape[1] > 1:
        told = {"documents": positions is not None, "state": state is not None, "padding": padding is not None}
        if conv_refusal(x.shape[2], weight.shape[-1], x.dtype, **told) is None:
            from hybridlm.ops.kernels.calls import kernel_conv

            newest = _newest(x, None if state is None else as_dtype(state, x.dtype), front)
            return kernel_conv(x, weight, bias, state, positions), newest
    weight, bias = as_dtype(weight, x.dtype), as_dtype(bias, x.dtype)
    before = None if state is None else as_dtype(state, x.dtype)
    if padding is not None:
        line = after_padding(x.new_zeros(x.shape[0], front, x.shape[2]) if before is None else before, x, padding)
        before, x = line[:, :front], line[:, front:]
    if x.shape[1] == 1 and before is not None:
        out, state = _one_token(x, weight, bias, before, positions)
    else:
        out, state = called(_causal_conv, x, weight, bias, before, positions)[0], _newest(x, before, front)
    if padding is not None:
        out = out.masked_fill((torch.arange(x.shape[1], device=x.device) < padding.unsqueeze(1)).unsqueeze(-1), 0.0)
    return out, state


def _one_token(
    x: Tensor, weight: Tensor, bias: Tensor, before: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for one token after ``before``, in a fifth of the operator's time."""
    line = counted = torch.cat((before, x), 1)  # (B, K, C)
    if positions is not None:
        lags = torch.arange(before.shape[1], -1, -1, device=x.device).unsqueeze(-1)
        counted = line.masked_fill(lags > positions.unsqueeze(-1), 0.0)
    out = (counted * weight[:, 0].t()).sum(1, keepdim=True, dtype=x.dtype).add_(bias)
    return torch.nn.functional.silu(out), line[:, 1:]


def _newest(x: Tensor, before: Tensor | None, count: int) -> Tensor:
    """The last ``count`` inputs: (B, count, C)."""
    missing = count - x.shape[1]
    if missing <= 0:
        return x[:, x.shape[1] - count :]
    if before is None:
        return torch.nn.functional.pad(x, (0, 0, missing, 0))
    return torch.cat((before[:, count - missing :], x), 1)

"""Rotary position embedding (Su et al. 2021), half-split (GPT-NeoX, Llama) or with neighbouring pairs (DeepSeek).

A rotation and its backward are one pass each; written with chunk and cat they are five.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.ops.dispatch import gradient_wanted
from hybridlm.ops.norm import as_dtype, at_least_fp32


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, head_dim / 2) of ``position * theta^(-2i / head_dim)``, in at least fp32.

    positions: (B, T) integers.
    """
    wide = at_least_fp32(dtype)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angles = positions.to(wide).unsqueeze(-1) * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates the pairs of x (B, T, H, head_dim) by the angles (B, T, R / 2), the same for every head; keeps x's dtype.

    The first R channels are rotated, the others kept. Pairs are (i, i + R / 2), or (2i, 2i + 1) where ``interleaved``;
    either way the result holds every pair's first channel and then every second.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    # In decode the operator's dispatch costs more than one token's rotation. (The compiler fails at _turn's out= into a
    # transposed view.)
    if not gradient_wanted(x) and not torch.compiler.is_compiling():
        return _turn(x, cos, sin, interleaved, False) if interleaved or x.shape[1] > 1 else _turn_token(x, cos, sin)
    out: Tensor = _rotate(x, cos, sin, interleaved, False)
    return out


def _pairs(x: Tensor, interleaved: bool) -> Tensor:
    """(..., 2, head_dim / 2) view: every pair's first channel, then every second."""
    half = x.shape[-1] // 2
    return x.view(*x.shape[:-1], half, 2).transpose(-1, -2) if interleaved else x.view(*x.shape[:-1], 2, half)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    """Forward, or the inverse rotation from the half-split layout back to that of the input."""
    wide = x.to(cos.dtype)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        out[..., width:] = wide[..., width:]
    source = _pairs(wide[..., :width], interleaved and not backward)
    target = _pairs(out[..., :width], interleaved and backward)
    sign = -1.0 if backward else 1.0
    torch.mul(source, cos.unsqueeze(-2), out=target)
    target[..., 0, :].addcmul_(source[..., 1, :], sin, value=-sign)
    target[..., 1, :].addcmul_(source[..., 0, :], sin, value=sign)
    return out.to(x.dtype)


def _turn_token(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``_turn`` in passes over all channels, which one token's are too few to be sliced for."""
    if (width := 2 * cos.shape[-1]) < x.shape[-1]:
        return torch.cat((_turn_token(x[..., :width], cos, sin), x[..., width:]), -1)
    wide = as_dtype(x, cos.dtype)
    turned = torch.cat((sin.neg(), sin), -1) * wide.roll(x.shape[-1] // 2, -1)
    return as_dtype(turned.addcmul_(wide, torch.cat((cos, cos), -1)), x.dtype)


@torch.library.custom_op("hybridlm::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    return _turn(x, cos, sin, interleaved, backward)


_rotate.register_fake(lambda x, cos, sin, interleaved, backward: x.new_empty(x.shape))


def _setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor
) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.interleaved, ctx.inverse = inputs[3], inputs[4]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
    dx: Tensor = _rotate(dy, cos, sin, ctx.interleaved, not ctx.inverse)  # type: ignore[attr-defined]
    return dx, None, None, None, None


_rotate.register_autograd(_backward, setup_context=_setup)

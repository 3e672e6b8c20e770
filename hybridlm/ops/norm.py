"""RMS normalisation, plain and gated, and the dtypes that arithmetic is done in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.ops.dispatch import differentiate, gradient_wanted, new_like


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and states: float32, or float64 where the input is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without the call where nothing is to be done: it takes 2 us, and a token has hundreds of
    them."""
    return x if x.dtype == dtype else x.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis; the mean is taken in at least fp32 (Zhang & Sennrich
    2019).

    x: (..., C); weight: (C,). Returns x's shape and dtype.
    """
    wide = at_least_fp32(x.dtype)
    weight = as_dtype(weight, wide)
    if gradient_wanted(x, weight):
        return as_dtype(torch.rms_norm(as_dtype(x, wide), (x.shape[-1],), weight, eps), x.dtype)
    return as_dtype(rms_norm_of_one(as_dtype(x, wide), weight, eps), x.dtype)


def rms_norm_of_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` without gradients, where x and weight have one dtype of at least fp32."""
    return _normed(x, eps).mul_(weight)


def _normed(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` where no gradient is needed: half the time that torch.rms_norm takes for one token,
    which makes of it seven operators, one of them a mean that copies its divisor."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return x * torch.add(eps, squares, alpha=1 / x.shape[-1]).rsqrt_()


@torch.library.custom_op("hybridlm::gated_rms_norm", mutates_args=())
def _gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    """Returns the result in y's dtype and 1 / rms (..., groups) in the wide one, all that the backward needs besides
    its inputs."""
    wide = at_least_fp32(y.dtype)
    gate = F.silu(as_dtype(z, wide))
    out = y.to(wide, copy=True) if norm_before_gate else gate * y
    slices = out.view(*out.shape[:-1], groups, -1)
    inverse = slices.square().mean(-1).add_(eps).rsqrt_()
    slices.mul_(inverse.unsqueeze(-1))
    out.mul_(weight)
    return as_dtype(out.mul_(gate) if norm_before_gate else out, y.dtype), inverse


_gated_rms_norm.register_fake(
    lambda y, z, weight, eps, groups, norm_before_gate: (
        y.new_empty(y.shape),
        y.new_empty((*y.shape[:-1], groups), dtype=at_least_fp32(y.dtype)),
    )
)


@torch.library.custom_op("hybridlm::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, inverse: Tensor, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and weight. With n = u / rms, u being what is normalised: du = (dn - n mean(dn n)) / rms over
    each slice."""
    wide, slices, inverse = inverse.dtype, (inverse.shape[-1], -1), inverse.unsqueeze(-1)
    dout, y_wide, z_wide, w = (tensor.to(wide) for tensor in (dout, y, z, weight))
    gate = F.silu(z_wide)
    n = (y_wide if norm_before_gate else y_wide * gate).unflatten(-1, slices).mul(inverse).flatten(-2)
    dz = torch.ops.aten.silu_backward((dout * n).mul_(w), z_wide) if norm_before_gate else None
    dn = dout * gate if norm_before_gate else dout  # of n w
    product = dn * n
    dweight = product.flatten(0, -2).sum(0)
    mean = product.mul_(w).unflatten(-1, slices).mean(-1, keepdim=True)
    du = torch.mul(dn, w, out=product)
    du.unflatten(-1, slices).addcmul_(n.unflatten(-1, slices), mean, value=-1).mul_(inverse)
    if dz is None:
        dz = torch.ops.aten.silu_backward(torch.mul(du, y_wide, out=n), z_wide)
        du.mul_(gate)
    return du.to(y.dtype), dz.to(z.dtype).contiguous(), dweight.to(weight.dtype)


_gated_rms_norm_backward.register_fake(
    lambda dout, y, z, weight, inverse, norm_before_gate: tuple(new_like(y, z, weight))
)


differentiate(_gated_rms_norm, _gated_rms_norm_backward, "out inverse", "y z weight")


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, *, groups: int, norm_before_gate: bool) -> Tensor:
    """Mamba-2's output norm, over each of ``groups`` slices of the last axis. Its backward computes the gate again
    instead of keeping it.

    ``norm_before_gate=False``: ``rms(y * silu(z)) * weight`` (Mamba-2); True: ``rms(y) * weight * silu(z)`` (FalconH1).
    y, z: (..., E); weight: (E,). Returns y's shape and dtype.
    """
    if gradient_wanted(y, z, weight):
        out: Tensor = _gated_rms_norm(y, z, weight, eps, groups, norm_before_gate)[0]
        return out
    wide = at_least_fp32(y.dtype)
    gate = F.silu(as_dtype(z, wide))
    slices = (as_dtype(y, wide) if norm_before_gate else gate * y).view(*y.shape[:-1], groups, -1)
    out = _normed(slices, eps).view(y.shape).mul_(weight)
    return as_dtype(out.mul_(gate) if norm_before_gate else out, y.dtype)

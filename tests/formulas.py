"""What the references share: the metric of every comparison, and the elementary formulas, with no code of the
package."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


def relative_error(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want|, in float64: the metric of every comparison. Shapes must agree."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-300))


def assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> None:
    """Every tensor of ``want`` is in ``got``, and no other, within ``tolerance`` relative to its largest value."""
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def below(p: Params, prefix: str) -> dict[str, Tensor]:
    """The parameters whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) with no threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def group_rms_norm(x: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    """Each of ``n_groups`` equal slices of the last dimension has its own mean square."""
    width = x.shape[-1] // n_groups
    slices = [slice(g * width, (g + 1) * width) for g in range(n_groups)]
    return torch.cat([rms_norm(x[..., s], weight[s], eps) for s in slices], dim=-1)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """Depthwise: ``out_t = bias + sum_k weight[:, k] * x_(t-K+1+k)``. x (B,T,C), weight (C,1,K); ``past`` (B,any,C)
    came before."""
    taps = weight.reshape(weight.shape[0], -1)
    width = taps.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    if past is not None:
        before = torch.cat([before, past], dim=1)
    line = torch.cat([before, x], dim=1)
    outputs = []
    for t in range(x.shape[1]):
        now = before.shape[1] + t
        out = bias.expand(x.shape[0], -1)
        for k in range(width):
            out = out + taps[:, k] * line[:, now - width + 1 + k]
        outputs.append(out)
    return torch.stack(outputs, dim=1)

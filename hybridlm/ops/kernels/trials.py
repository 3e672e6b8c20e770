"""Small runs of each compiled kernel beside our torch operator, with packed documents where supported, for probes and
parity tests. Each returns the largest difference of outputs and gradients, relative to the largest number of its
kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.ops.attention import attention
from hybridlm.ops.conv import causal_conv
from hybridlm.ops.cross_entropy import IGNORE, linear_cross_entropy
from hybridlm.ops.kernels.choice import CUDA
from hybridlm.ops.kernels.mamba3_trials import mimo_pair, siso_pair
from hybridlm.ops.kernels.rules import Sizes
from hybridlm.ops.norm import gated_rms_norm
from hybridlm.ops.selective_scan import selective_scan
from hybridlm.ops.ssd import ssd

SMALL = Sizes()


class Draw:
    """Draws random tensors that require gradients, the same on every device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device, self.generator, self.drawn = device, torch.Generator().manual_seed(seed), list[Tensor]()

    def __call__(
        self, *shape: int, dtype: torch.dtype = torch.float32, make: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Normal numbers, or what ``make`` turns them into."""
        values = torch.randn(shape, generator=self.generator)
        tensor = (values if make is None else make(values)).to(self.device, dtype).requires_grad_()
        self.drawn.append(tensor)
        return tensor

    def starts(self, batch: int, time: int) -> Tensor:
        """(B, T): a few documents in each row, at different places."""
        starts = torch.zeros(batch, time, dtype=torch.bool)
        for row in range(batch):
            starts[row, 3 + row :: 11 + row] = True
        return starts.to(self.device)


def difference(mine: Sequence[Tensor], theirs: Sequence[Tensor], drawn: Sequence[Tensor]) -> float:
    """Between outputs, and between the gradients of a fixed sum of them, in float64 on the CPU."""
    worst = [_relative(a, b) for a, b in zip(mine, theirs, strict=True)]
    grads = []
    for outputs in (mine, theirs):
        loss = torch.stack([_weighed(output) for output in outputs if output.requires_grad]).sum()
        grads.append(torch.autograd.grad(loss, drawn, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is not None and b is not None:
            worst.append(_relative(a, b))
    return float("nan") if any(math.isnan(value) for value in worst) else max(worst)


def _weighed(output: Tensor) -> Tensor:
    """A sum in which each number counts differently."""
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    return (output.float() * weights).sum()


def _relative(mine: Tensor, theirs: Tensor) -> float:
    a, b = (tensor.detach().cpu().double() for tensor in (mine, theirs))
    if a.shape != b.shape:
        return float("inf")
    scale = float(a.abs().max())
    gap = float((a - b).abs().max())
    return gap / scale if scale > 0 else gap


def conv(
    device: torch.device, dtype: torch.dtype, sizes: Sizes = SMALL, *, documents: bool = True, state: bool = False
) -> float:
    """causal-conv1d."""
    draw = Draw(device)
    x = draw(sizes.batch, sizes.time, sizes.channels, dtype=dtype)
    weight, bias = draw(sizes.channels, 1, sizes.width), draw(sizes.channels)
    before = draw(sizes.batch, sizes.width - 1, sizes.channels, dtype=dtype) if state else None
    positions = positions_of(draw.starts(sizes.batch, sizes.time)) if documents else None
    mine = causal_conv(x, weight, bias, before, positions=positions)
    return difference(mine, causal_conv(x, weight, bias, before, positions=positions, backend=CUDA), draw.drawn)


def positions_of(starts: Tensor) -> Tensor:
    """(B, T) place of each token in its document."""
    columns = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return columns - torch.where(starts, columns, 0).cummax(1).values


def mamba1(device: torch.device, dtype: torch.dtype, sizes: Sizes = SMALL) -> float:
    """mamba-ssm's selective scan, the final state without its gradient."""
    draw = Draw(device)
    x = draw(sizes.batch, sizes.time, sizes.channels, dtype=dtype)
    dt = draw(sizes.batch, sizes.time, sizes.channels, make=F.softplus)
    A = draw(sizes.channels, sizes.d_state, make=lambda values: -values.exp())
    B, C = (draw(sizes.batch, sizes.time, sizes.d_state, dtype=dtype) for _ in range(2))
    D = draw(sizes.channels)
    y, state = selective_scan(x, dt, A, B, C, D)
    return difference((y, state.detach()), selective_scan(x, dt, A, B, C, D, backend=CUDA), draw.drawn)


def mamba2(
    device: torch.device, dtype: torch.dtype, sizes: Sizes = SMALL, *, documents: bool = True, state: bool = True
) -> float:
    """mamba-ssm's SSD scan, from a state and with documents."""
    draw = Draw(device)
    x = draw(sizes.batch, sizes.time, sizes.heads, sizes.head_dim, dtype=dtype)
    dt = draw(sizes.batch, sizes.time, sizes.heads, make=F.softplus)
    A = draw(sizes.heads, make=lambda values: -values.exp())
    B, C = (draw(sizes.batch, sizes.time, sizes.groups, sizes.d_state, dtype=dtype) for _ in range(2))
    D = draw(sizes.heads)
    before = draw(sizes.batch, sizes.heads, sizes.head_dim, sizes.d_state) if state else None
    starts = draw.starts(sizes.batch, sizes.time) if documents else None
    mine = ssd(x, dt, A, B, C, D, initial_state=before, starts=starts)
    return difference(mine, ssd(x, dt, A, B, C, D, initial_state=before, starts=starts, backend=CUDA), draw.drawn)


def mamba2_layer(device: torch.device, dtype: torch.dtype, sizes: Sizes = SMALL, *, documents: bool = True) -> float:
    """mamba-ssm's convolution, SSD scan, norm and output projection in one."""
    from hybridlm.ops.kernels.calls import LayerWeights, kernel_mamba2_layer

    draw, heads, inner = Draw(device), sizes.heads, sizes.heads * sizes.head_dim
    state_channels = sizes.groups * sizes.d_state
    channels = inner + 2 * state_channels
    zxbcdt = draw(sizes.batch, sizes.time, inner + channels + heads, dtype=dtype)
    weights = LayerWeights(
        conv_weight=draw(channels, 1, sizes.width),
        conv_bias=draw(channels),
        dt_bias=draw(heads),
        A_log=draw(heads),
        D=draw(heads),
        norm=draw(inner),
        out_proj=draw(sizes.channels, inner, dtype=dtype),
    )
    starts = draw.starts(sizes.batch, sizes.time) if documents else None
    z, xbc, dt = zxbcdt.split((inner, channels, heads), -1)
    xbc, _ = causal_conv(
        xbc, weights.conv_weight, weights.conv_bias, positions=None if starts is None else positions_of(starts)
    )
    x, B, C = xbc.split((inner, state_channels, state_channels), -1)
    y, _ = ssd(
        x.unflatten(-1, (heads, -1)),
        F.softplus(dt.float() + weights.dt_bias),
        -weights.A_log.exp(),
        B.unflatten(-1, (sizes.groups, -1)),
        C.unflatten(-1, (sizes.groups, -1)),
        weights.D,
        starts=starts,
    )
    y = gated_rms_norm(y.flatten(2), z, weights.norm, 1e-5, groups=sizes.groups, norm_before_gate=False)
    limit = (0.0, float("inf"))
    settings = {"head_dim": sizes.head_dim, "n_groups": sizes.groups}
    theirs = kernel_mamba2_layer(
        zxbcdt, weights, starts, **settings, dt_limit=limit, norm_eps=1e-5, norm_before_gate=False
    )
    return difference((y @ weights.out_proj.t(),), (theirs,), draw.drawn)


def siso(device: torch.device, dtype: torch.dtype, sizes: Sizes = SMALL, *, documents: bool = True) -> float:
    """mamba-ssm's Mamba-3 of one rank."""
    draw = Draw(device)
    return difference(
        *siso_pair(draw, dtype, sizes, draw.starts(sizes.batch, sizes.time) if documents else None), draw.drawn
    )


def mimo(device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None, *, documents: bool = True) -> float:
    """mamba-ssm's Mamba-3 of several ranks, at widths that its authors have tested."""
    sizes = sizes or Sizes(batch=1, time=32, head_dim=64, d_state=64, angles=16)
    draw = Draw(device)
    return difference(
        *mimo_pair(draw, dtype, sizes, draw.starts(sizes.batch, sizes.time) if documents else None), draw.drawn
    )


def loss(
    device: torch.device, dtype: torch.dtype, *, rows: int = 48, vocab: int = 61, softcap: float | None = None
) -> float:
    """Liger's linear cross-entropy, with ignored targets and padded ids."""
    draw = Draw(device)
    hidden, weight = draw(rows, 32, dtype=dtype), draw(vocab + 3, 32)
    targets = torch.randint(0, vocab, (rows,), generator=draw.generator)
    targets[::5] = IGNORE
    arguments = (hidden, weight, targets.to(device))
    mine = linear_cross_entropy(*arguments, vocab=vocab, softcap=softcap)
    return difference(
        (mine,), (linear_cross_entropy(*arguments, vocab=vocab, softcap=softcap, backend=CUDA),), draw.drawn
    )


def flash_attention(device: torch.device, dtype: torch.dtype) -> float:
    """torch's flash backend."""
    return _attention(device, dtype, torch.nn.attention.SDPBackend.FLASH_ATTENTION)


def efficient_attention(device: torch.device, dtype: torch.dtype) -> float:
    """torch's memory-efficient backend."""
    return _attention(device, dtype, torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION)


def _attention(device: torch.device, dtype: torch.dtype, backend: torch.nn.attention.SDPBackend) -> float:
    draw = Draw(device)
    q, k, v = (draw(1, 32, 2, 16, dtype=dtype) for _ in range(3))
    mine = attention(q.float(), k.float(), v.float(), scale=0.25)
    with torch.nn.attention.sdpa_kernel(backend):
        theirs = attention(q, k, v, scale=0.25)
    return difference((mine,), (theirs,), draw.drawn)


def bitsandbytes_adamw(device: torch.device, dtype: torch.dtype) -> float:
    """A step of bitsandbytes' 8-bit AdamW; the difference from torch's is relative to the length of the step."""
    import bitsandbytes

    weights = [torch.nn.Parameter(torch.ones(64, 128, device=device)) for _ in range(2)]
    for weight, kind in zip(weights, (torch.optim.AdamW, bitsandbytes.optim.AdamW8bit), strict=True):
        weight.grad = torch.linspace(-1, 1, weight.numel(), device=device).view(weight.shape)
        kind([weight], lr=0.1).step()
    return float((weights[0] - weights[1]).abs().max()) / 0.1

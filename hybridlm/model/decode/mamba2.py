"""One token through Mamba-2."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridlm.layers.cache import LayerCache, StateCache
from hybridlm.model.decode.projection import Projection, normed

if TYPE_CHECKING:
    from hybridlm.layers.mamba2 import Mamba2
    from hybridlm.layers.sequence import SequenceInfo


class Mamba2Token:
    """What ``Mamba2.forward`` gives for one token after a state, in fewer operators: decays and taps are made once."""

    def __init__(self, mixer: Mamba2) -> None:
        spec = self.spec = mixer.spec
        self.in_proj, self.out_proj = Projection(mixer.in_proj.weight), Projection(mixer.out_proj.weight)
        assert mixer.conv1d.bias is not None
        self.taps, self.bias = mixer.conv1d.weight[:, 0].t().contiguous(), mixer.conv1d.bias
        self.A, self.dt_bias, self.D, self.norm = (
            -mixer.A_log.exp(),
            mixer.dt_bias,
            mixer.D.unsqueeze(-1),
            mixer.norm.weight,
        )
        self.parts = [spec.d_inner, spec.conv_channels, spec.n_heads]
        self.channels = [spec.d_inner, spec.n_groups * spec.d_state, spec.n_groups * spec.d_state]
        self.limit = None if spec.dt_limit == (0.0, math.inf) else spec.dt_limit

    def __call__(self, x: Tensor, cache: LayerCache, seq: SequenceInfo) -> Tensor:
        """(B, D), normalised, to (B, D); the cache is brought up to date."""
        assert isinstance(cache, StateCache)
        spec, rows = self.spec, x.shape[0]
        z, xBC, dt = self.in_proj(x).split_with_sizes(self.parts, -1)
        inner, B, C = self._convolved(xBC, cache["conv"]).split_with_sizes(self.channels, -1)
        dt = F.softplus(dt + self.dt_bias)  # (B, H)
        if self.limit is not None:
            dt = dt.clamp(*self.limit)
        inner = inner.view(rows, spec.n_heads, spec.head_dim)
        state = cache["ssm"]
        state.mul_((dt * self.A).exp_().view(rows, -1, 1, 1))
        written = (inner * dt.unsqueeze(-1)).view(rows, spec.n_groups, -1, 1)
        state = state.view(rows, spec.n_groups, -1, spec.d_state)  # the heads of a group share its B and C
        state.addcmul_(written, B.view(rows, spec.n_groups, 1, -1))
        y = (
            torch.bmm(state.flatten(0, 1), C.reshape(rows * spec.n_groups, -1, 1))
            .view(inner.shape)
            .addcmul_(self.D, inner)
        )
        return self.out_proj(self._gated(y.view(rows, -1), z))

    def _convolved(self, new: Tensor, kept: Tensor) -> Tensor:
        line = torch.cat((kept, new.unsqueeze(1)), 1)  # (B, K, C)
        kept.copy_(line[:, 1:])
        return F.silu((line * self.taps).sum(1).add_(self.bias), inplace=True)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """(B, E) both."""
        spec = self.spec
        if not spec.norm_before_gate:
            y = F.silu(z).mul_(y)
        if spec.n_groups == 1:
            out = normed(y, self.norm, spec.norm_eps)
        else:
            out = normed(y.view(len(y), spec.n_groups, -1), self.norm.view(spec.n_groups, -1), spec.norm_eps).view(
                y.shape
            )
        return out.mul_(F.silu(z)) if spec.norm_before_gate else out

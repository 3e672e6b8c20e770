"""The short causal convolution in front of a recurrence: its parameters are an ``nn.Conv1d``'s, under mamba_ssm's
names."""

from __future__ import annotations

from torch import Tensor, nn

from hybridlm.layers.cache import StateCache
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.ops.conv import causal_conv


def depthwise(channels: int, width: int, *, bias: bool = True) -> nn.Conv1d:
    """A container of the parameters; ``short_conv`` does the computing."""
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias)


def short_conv(conv: nn.Conv1d, x: Tensor, seq: SequenceInfo, cache: StateCache | None) -> Tensor:
    """``silu(conv(x))`` over (B, T, C), restarted at documents; the cache's state ``conv`` is read and updated."""
    state, positions = None if cache is None else cache["conv"], None if seq.doc_ids is None else seq.positions
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    x, state = causal_conv(
        x, conv.weight, bias, state, positions=positions, padding=seq.padding, backend=seq.kernels.conv
    )
    if cache is not None:
        cache.update({"conv": state})
    return x

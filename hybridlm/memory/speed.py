"""Estimates of time, from FLOPs, a device's peaks and a simple model. They rank choices; no measurement stands behind
them.

A step takes ``FLOPs / (peak x _SHARE)``, more by what is computed again, and more by ``1 + _SMALL / tokens`` for
micro-batches of few tokens, which fill a device badly. The optimizer reads and writes weights, gradients and state
once, at the memory's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from hybridlm.memory.timeline import Cut
from hybridlm.memory.updates import Update
from hybridlm.memory.workload import Workload
from hybridlm.model.block import Block
from hybridlm.model.count import flops_per_token
from hybridlm.model.lm import HybridLM
from hybridlm.ops.cross_entropy import ROWS

_SHARE = 0.4  # of the peak that training and prefill reach
_SMALL = 1024  # tokens of a micro-batch that take twice the time of their arithmetic
_FEWER_ROWS = 1.02  # smaller products in the loss


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s of one device; None: unknown."""

    flops: float | None
    bandwidth: float | None


def relative_time(model: HybridLM, work: Workload, cut: Cut) -> float:
    """Of a step cut so, where 1 is a step of one endless micro-batch in which nothing is computed again."""
    tokens = cut.batch_size * work.seq_len
    return (1 + again(model, work, cut)) * (1 + _SMALL / tokens) * (1.0 if cut.rows >= ROWS else _FEWER_ROWS)


def again(model: HybridLM, work: Workload, cut: Cut) -> float:
    """FLOPs of layers computed again, as a share of the step's others."""
    if not cut.checkpoint_blocks:
        return 0.0
    blocks = [cast(Block, block) for block in list(model.blocks)[:: cut.checkpoint_blocks]]
    forward = sum(
        block.mixer.flops(work.seq_len, "prefill") + (block.ffn.flops("prefill") if block.ffn is not None else 0.0)
        for block in blocks
    )
    return forward / flops_per_token(model, work.seq_len, "train")


def tokens_per_second(model: HybridLM, work: Workload, cut: Cut, update: Update, rates: Rates) -> float | None:
    """Of one device in training; None: its peak is unknown."""
    if rates.flops is None:
        return None
    tokens = cut.batch_size * cut.accumulate * work.seq_len
    seconds = (
        tokens
        * flops_per_token(model, work.seq_len, "train")
        * relative_time(model, work, cut)
        / (rates.flops * _SHARE)
    )
    if rates.bandwidth is not None:
        seconds += 2 * (update.weights + update.gradients + update.state) / rates.bandwidth
    return tokens / seconds


def prefill_tokens_per_second(model: HybridLM, context: int, rates: Rates) -> float | None:
    return None if rates.flops is None else rates.flops * _SHARE / flops_per_token(model, context, "prefill")


def decode_tokens_per_second(model: HybridLM, context: int, cache: int, width: int, rates: Rates) -> float | None:
    """One sequence: each token reads the weights that it meets (``width`` bytes each) and ``cache`` bytes."""
    if rates.bandwidth is None:
        return None
    met = flops_per_token(model, 1, "decode") / 2
    return rates.bandwidth / (met * width + cache)

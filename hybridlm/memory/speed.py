"""Estimates of training and generation speed from FLOPs, a device's peaks and a simple model: to rank options, not
measured.

A step takes ``FLOPs / (peak x _SHARE)``, plus the recomputation of checkpointed layers, times ``1 + _SMALL / tokens``
because small micro-batches underuse a device. The optimizer reads and writes weights, gradients and state once, at the
memory's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from hybridlm.memory.optimizer import OptimizerMemory
from hybridlm.memory.timeline import StepSettings
from hybridlm.memory.workload import Workload
from hybridlm.model.block import Block
from hybridlm.model.build import build_block
from hybridlm.model.count import flops_per_token, parameters, state_bytes
from hybridlm.model.lm import HybridLM
from hybridlm.ops.cross_entropy import ROWS

CONTEXTS = (1024, 4096, 16384, 65536)
ALL_ATTENTION = "T"
_SHARE = 0.4  # of the peak that training and prefill reach
_SMALL = 1024  # tokens of a micro-batch that take twice the time of their arithmetic
_FEWER_ROWS = 1.02  # smaller products in the loss


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s of one device; None: unknown."""

    flops: float | None
    bandwidth: float | None


def relative_time(model: HybridLM, work: Workload, step: StepSettings) -> float:
    """Relative to a step of one infinitely large micro-batch without activation checkpointing."""
    every = step.checkpoint_blocks
    blocks = [cast(Block, block) for block in list(model.blocks)[::every]] if every else []
    again = sum(  # FLOPs of recomputing checkpointed layers
        block.mixer.flops(work.seq_len, "prefill") + (block.ffn.flops("prefill") if block.ffn is not None else 0.0)
        for block in blocks
    )
    recomputed = again / flops_per_token(model, work.seq_len, "train")
    tokens = step.batch_size * work.sequences * work.seq_len
    return (1 + recomputed) * (1 + _SMALL / tokens) * (1.0 if step.rows >= ROWS else _FEWER_ROWS)


def tokens_per_second(
    model: HybridLM, work: Workload, step: StepSettings, update: OptimizerMemory, rates: Rates
) -> float | None:
    """Training throughput of one device; None: its peak is unknown."""
    if rates.flops is None:
        return None
    tokens = step.batch_size * step.accumulate * work.sequences * work.seq_len
    seconds = (
        tokens
        * flops_per_token(model, work.seq_len, "train")
        * relative_time(model, work, step)
        / (rates.flops * _SHARE)
    )
    if rates.bandwidth is not None:
        seconds += 2 * (update.weights + update.gradients + update.state) / rates.bandwidth
    return tokens / seconds


@dataclass(frozen=True)
class Context:
    """One sequence with a context of ``tokens``. cache: bytes; attention: bytes of the cache if every layer were
    attention; prefill, decode: estimated tokens per second, None: the device's peaks are unknown."""

    tokens: int
    cache: int
    attention: int
    prefill: float | None
    decode: float | None


@dataclass(frozen=True)
class Inference:
    """weights: bytes, in ``dtype``."""

    dtype: str
    weights: int
    contexts: tuple[Context, ...]


def inference_of(work: Workload, rates: Rates, model: HybridLM) -> Inference:
    """In 16 bits on a GPU (bfloat16 and float16 take the same), in float32 on a CPU."""
    dtype = torch.bfloat16 if work.gpu else torch.float32
    (attention,) = work.model.model_copy(update={"pattern": ALL_ATTENTION, "n_layers": 1}).layers
    with torch.device("meta"):
        other = build_block(attention, work.model).mixer
    contexts = []
    for tokens in CONTEXTS:
        cache = state_bytes(model, tokens, 1, dtype)
        all_attention = len(work.layers) * other.state_bytes(tokens, 1, dtype)
        prefill = rates.flops and rates.flops * _SHARE / flops_per_token(model, tokens, "prefill")
        # A token reads its active weights and the cache.
        active = flops_per_token(model, 1, "decode") / 2 * dtype.itemsize
        decode = rates.bandwidth and rates.bandwidth / (active + cache)
        contexts.append(Context(tokens, cache, all_attention, prefill, decode))
    return Inference(str(dtype).removeprefix("torch."), parameters(model) * dtype.itemsize, tuple(contexts))

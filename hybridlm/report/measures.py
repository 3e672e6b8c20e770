"""What is measured of a run: how good it is, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from hybridlm.config.load import validate_model
from hybridlm.errors import UserError
from hybridlm.report.facts import number
from hybridlm.report.reading import Run, first_number


@dataclass(frozen=True)
class Measure:
    """One number of a run. unit: how it is scaled and named in tables; better: which way a reader wants it, None for
    neither."""

    key: str
    title: str
    unit: Literal["bits/byte", "nats/target", "share", "tokens/s", "GiB", "bytes", "FLOP", "count", "seconds", "hours"]
    better: Literal["less", "more"] | None
    of: Callable[[Run], float | None]


def _of_summary(key: str) -> Callable[[Run], float | None]:
    return lambda run: number(run.summary.get(key))


# The first of these that a finished run has is the one that runs are ranked by.
QUALITIES = (
    Measure("val/bpb", "bits per byte", "bits/byte", "less", _of_summary("val/bpb")),
    Measure("val/accuracy", "accuracy", "share", "more", _of_summary("val/accuracy")),
    Measure("val/loss", "validation loss", "nats/target", "less", _of_summary("val/loss")),
)
EXACT = Measure("val/exact", "whole answers right", "share", "more", _of_summary("val/exact"))


def cache_bytes(run: Run) -> float | None:
    """Bytes of all caches of one sequence as long as a training window, in fp32, by the layers' own count; None where
    the model section is not one of this version."""
    context = run.config.get("data.seq_len")
    return _cache_bytes(run.model, context) if run.model and isinstance(context, int) else None


@cache
def _cache_bytes(model: str, context: int) -> float | None:
    from hybridlm.model.build import build_model  # imports torch
    from hybridlm.model.count import state_bytes

    try:
        built = build_model(validate_model(json.loads(model)), 1)  # the vocabulary has no part in the state
        return number(state_bytes(built, context))
    except (
        UserError,
        ArithmeticError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # also for sizes that no tensor can have
        return None


def _device_hours(run: Run) -> float | None:
    devices = first_number(run.summary.get("devices"), run.config.get("trainer.devices"))
    return None if devices is None or run.seconds is None else run.seconds * devices / 3600


SPEED = Measure("tokens_per_s", "training speed", "tokens/s", "more", _of_summary("tokens_per_s"))
MEMORY = Measure("memory_gb", "peak memory", "GiB", "less", _of_summary("memory_gb"))
CACHE = Measure("cache_bytes", "cache of one window", "bytes", "less", cache_bytes)
FLOPS = Measure(
    "train_flops_per_token", "training FLOPs per token", "FLOP", "less", _of_summary("train_flops_per_token")
)
TOKENS = Measure("tokens", "tokens trained on", "count", None, _of_summary("tokens"))
TRADED = (SPEED, MEMORY, CACHE, FLOPS)  # what quality is drawn against
COSTS = (
    *TRADED,
    Measure("parameters", "parameters", "count", None, _of_summary("parameters")),
    TOKENS,
    Measure("seconds", "time", "seconds", None, lambda run: run.seconds),
    Measure("device_hours", "device time", "hours", None, _device_hours),
)

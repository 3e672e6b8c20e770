"""What is measured of a run: how good it is and what it costs; means over seeds, and when a difference counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Literal

from hybridlm.config.load import validate_model
from hybridlm.errors import UserError
from hybridlm.report.runs import Run, number

_SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
    "FLOP": ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP")),
    "count": ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"), (1, "")),
    "seconds": ((3600, "h"), (60, "min"), (1, "s")),
}


@dataclass(frozen=True)
class Metric:
    """One number of a run. key: in summary.json, unless it is computed; unit: how it is scaled and labelled in tables;
    better: None if neither direction is."""

    key: str
    title: str
    unit: Literal["bits/byte", "nats/target", "share", "tokens/s", "GiB", "bytes", "FLOP", "count", "seconds", "hours"]
    better: Literal["less", "more"] | None
    computed: Callable[[Run], float | None] | None = None

    def of(self, run: Run) -> float | None:
        return number(run.summary.get(self.key)) if self.computed is None else self.computed(run)

    def text(self, value: float) -> str:
        """A value of a quality metric."""
        return f"{value:.{3 if self.unit == 'share' else 4}f}"

    @property
    def label(self) -> str:
        return f"{self.title}, {self.better} is better"


@cache
def _cache_bytes(model: str, context: int) -> float | None:
    """None if the model section is not one of this version, or asks for sizes that no tensor can have."""
    from hybridlm.model.build import build_model  # imports torch
    from hybridlm.model.count import state_bytes

    try:
        built = build_model(validate_model(json.loads(model)), 1)  # the vocabulary has no part in the state
        return number(state_bytes(built, context))
    except (UserError, ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError):
        return None


def cache_bytes(run: Run) -> float | None:
    """Bytes of the decode caches of one sequence as long as a training window, in fp32."""
    context = run.config.get("data.seq_len")
    return _cache_bytes(run.model, context) if run.model and isinstance(context, int) else None


def _device_hours(run: Run) -> float | None:
    devices = number(run.summary.get("devices"))
    devices = number(run.config.get("trainer.devices")) if devices is None else devices
    return None if devices is None or run.seconds is None else run.seconds * devices / 3600


# Runs are ranked by the first of these that a finished run has.
QUALITIES = (
    Metric("val/bpb", "bits per byte", "bits/byte", "less"),
    Metric("val/accuracy", "accuracy", "share", "more"),
    Metric("val/loss", "validation loss", "nats/target", "less"),
)
EXACT = Metric("val/exact", "exact match", "share", "more")
SPEED = Metric("tokens_per_s", "training speed", "tokens/s", "more")
MEMORY = Metric("memory_gb", "peak memory", "GiB", "less")
CACHE = Metric("cache_bytes", "decode cache of one window", "bytes", "less", cache_bytes)
FLOPS = Metric("train_flops_per_token", "training FLOPs per token", "FLOP", "less")
TOKENS = Metric("tokens", "tokens trained on", "count", None)
TRADED = (SPEED, MEMORY, CACHE, FLOPS)  # quality is plotted against these
COSTS = (
    *TRADED,
    Metric("parameters", "parameters", "count", None),
    TOKENS,
    Metric("seconds", "time", "seconds", None, lambda run: run.seconds),
    Metric("device_hours", "device time", "hours", None, _device_hours),
)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for fewer than two values) and count of the finite ones of some values."""

    mean: float
    std: float | None
    n: int


def spread(values: Iterable[float]) -> Spread | None:
    """None if no value is finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    return Spread(fmean(finite), stdev(finite) if len(finite) > 1 else None, len(finite))


def pooled_std(spreads: Iterable[Spread]) -> float | None:
    """The standard deviation within groups: the root of the mean variance, weighted by n - 1. None if no group has two
    values."""
    repeated = [(one.std, one.n - 1) for one in spreads if one.std is not None]
    if not repeated:
        return None
    return math.sqrt(math.fsum(std**2 * freedom for std, freedom in repeated) / sum(freedom for _, freedom in repeated))


@dataclass(frozen=True)
class Difference:
    """value: of two means. std: the pooled standard deviation it is compared with; None: unknown, as nothing was
    repeated."""

    value: float
    std: float | None

    @property
    def within_noise(self) -> bool:
        """Whether seeds alone explain the difference. Equal means do not differ, whatever the spread."""
        return self.value == 0 or (self.std is not None and abs(self.value) <= self.std)


def difference(one: Spread, best: Spread, everyone: Iterable[Spread]) -> Difference:
    """``one`` minus ``best``, compared with the pooled standard deviation of these two or, if neither was repeated, of
    ``everyone``."""
    std = pooled_std((one, best))
    return Difference(one.mean - best.mean, pooled_std(everyone) if std is None else std)


@dataclass(frozen=True)
class Scale:
    """How the numbers of a column or an axis are written: divided by ``size``, with as many decimals as the smallest
    needs."""

    size: float
    unit: str
    decimals: int

    def label(self, title: str) -> str:
        return f"{title} ({self.unit})" if self.unit else title

    def text(self, value: float) -> str:
        return f"{value / self.size:,.{self.decimals}f}" if math.isfinite(value) else str(value)


def scale(values: Sequence[float], unit: str) -> Scale:
    """The largest unit in which no number is below 1, and three digits for the smallest."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    least = min(sizes, default=1.0)
    steps = _SCALES.get(unit, ((1.0, unit),))
    size, name = next((step for step in steps if least >= step[0]), steps[-1])
    whole = all(value == int(value) for value in sizes) and size == 1
    return Scale(size, name, 0 if whole else min(6, max(0, 2 - math.floor(math.log10(least / size)))))

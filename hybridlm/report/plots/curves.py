"""Learning curves: a metric by tokens and by seconds of training, as mean and spread over the runs of a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hybridlm.report.facts import number
from hybridlm.report.reading import Run
from hybridlm.report.spread import Spread, spread

_TRAINED = {"val/bpb": "train/bpb"}  # the sibling of training; of all else train/loss
SMOOTHING = "running mean over a tenth of the logged steps, at least 3"


@dataclass(frozen=True)
class Place:
    """What one run logged at one step. seconds: of steps, of waiting for data, of checkpoints and of validations, added
    up; a start's own, of imports and of compiling, are not in it."""

    step: int
    tokens: float
    seconds: float
    value: float


@dataclass(frozen=True)
class Mark:
    """Where the runs of a point stood after one and the same step."""

    tokens: float
    seconds: float
    value: Spread


def curve(runs: Sequence[Run], metric: str) -> list[Mark]:
    """The steps at which every run logged ``metric``; a number that is not finite is left out of its mean. Metrics of
    training, which are of one step each, are smoothed."""
    tracks = [list(track(run, metric)) for run in runs]
    by_step = [
        {place.step: place for place in (smoothed(one) if metric.startswith("train/") else one)} for one in tracks
    ]
    marks = []
    for step in sorted(set.intersection(*map(set, by_step))) if by_step else []:
        places = [of_run[step] for of_run in by_step]
        if (found := spread(place.value for place in places)) is not None:
            tokens, seconds = (
                sum(values) / len(places) for values in zip(*((one.tokens, one.seconds) for one in places), strict=True)
            )
            marks.append(Mark(tokens, seconds, found))
    return marks


def metric_drawn(points: Sequence[Sequence[Run]], quality: str) -> str:
    """The validation's metric where the runs of every point were validated more than once on their way, else its
    sibling of training.

    quality: by which the points are ranked; points without any metrics have no say.
    """
    trained = trained_metric(quality)
    logged = [runs for runs in points if len(curve(runs, trained)) > 1 or len(curve(runs, quality)) > 1]
    return quality if all(len(curve(runs, quality)) > 1 for runs in logged) else trained


def trained_metric(quality: str) -> str:
    return _TRAINED.get(quality, "train/loss")


def smoothed(places: Sequence[Place]) -> list[Place]:
    """Each value replaced by the mean of those around it: ``SMOOTHING``. At the ends fewer take part, and numbers that
    are not finite take none."""
    half = max(1, len(places) // 20)
    means = [spread(one.value for one in places[max(0, i - half) : i + half + 1]) for i in range(len(places))]
    return [replace(place, value=mean.mean) for place, mean in zip(places, means, strict=True) if mean is not None]


def interesting(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Ends of an axis of losses, by (tokens, value): the first quarter of each curve may lie above, and so may one that
    diverges, so that the rest is not flattened."""
    later = [value for places in curves for tokens, value in places if tokens >= places[-1][0] / 4]
    low, middle, high = min(later), sorted(later)[len(later) // 2], max(later)
    high = min(high, max(low, 2 * middle))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def track(run: Run, metric: str) -> Iterator[Place]:
    """Each row with the metric."""
    seconds, timed, pace = 0.0, 0, 0.0
    for row in run.rows:
        step = int(number(row["step"]) or 0)
        own = number(row.get("perf/step_s"))
        if own is not None:
            pace = own + (number(row.get("perf/data_s")) or 0.0)
        seconds += (step - timed) * pace
        timed = step
        seconds += sum(number(row.get(f"perf/{part}_s")) or 0.0 for part in ("ckpt", "val"))
        value, tokens = number(row.get(metric)), number(row.get("data/tokens"))
        if value is not None and tokens is not None:
            yield Place(step, tokens, seconds, value)

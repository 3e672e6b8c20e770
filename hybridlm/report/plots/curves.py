"""Learning curves: a metric by tokens and by seconds of training, as mean and spread over the runs of a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybridlm.report.facts import number
from hybridlm.report.reading import Run
from hybridlm.report.spread import Spread, spread


@dataclass(frozen=True)
class Mark:
    """Where the runs of a point stood after one and the same step."""

    tokens: float
    seconds: float
    value: Spread


def curve(runs: Sequence[Run], metric: str) -> list[Mark]:
    """The steps at which every run logged ``metric``; a number that is not finite is left out of its mean."""
    tracks = [{step: (tokens, seconds, value) for step, tokens, seconds, value in _track(run, metric)} for run in runs]
    marks = []
    for step in sorted(set.intersection(*map(set, tracks))) if tracks else []:
        tokens, seconds, values = zip(*(track[step] for track in tracks), strict=True)
        if (found := spread(values)) is not None:
            marks.append(Mark(sum(tokens) / len(tokens), sum(seconds) / len(seconds), found))
    return marks


def metric_drawn(runs: Sequence[Run], quality: str) -> str:
    """The validation's metric where the runs were validated more than once on the way, else its sibling of training."""
    often = any(sum(quality in row for row in run.rows) > 1 for run in runs)
    return quality if often else {"val/bpb": "train/bpb"}.get(quality, "train/loss")


def _track(run: Run, metric: str) -> Iterator[tuple[int, float, float, float]]:
    """(step, tokens, seconds, value) of each row with the metric. Seconds are of steps, of waiting for data, of checkpoints and of
    validations, added up; a start's own, of imports and of compiling, are not in it."""
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
            yield step, tokens, seconds, value

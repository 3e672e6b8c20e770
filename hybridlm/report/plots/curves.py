"""Curves with their spread over seeds: learning curves, accuracy by length, quality by a setting."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from hybridlm.report.comparison import Comparison
from hybridlm.report.evaluations import ByLength
from hybridlm.report.metrics import Metric, Spread, scale, spread
from hybridlm.report.plots.drawing import Drawing, draw, legend, limit_shares, line, time_label, tokens_label
from hybridlm.report.run_files import number, parsed_number
from hybridlm.report.runs import Run
from hybridlm.report.verdict import some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = "running mean over a tenth of the logged steps, at least 3"
_MAX_TICKS = 10  # with more values the axis chooses its own


@dataclass(frozen=True)
class Sample:
    """One logged value of a run. seconds: of steps, waiting for data, checkpoints and validations together, without
    imports and compilation."""

    step: int
    tokens: float
    seconds: float
    value: float


@dataclass(frozen=True)
class CurvePoint:
    """The runs of a configuration after the same step."""

    tokens: float
    seconds: float
    value: Spread


def logged(run: Run, metric: str) -> Iterator[Sample]:
    """Every row with the metric."""
    seconds, timed, pace = 0.0, 0, 0.0
    for row in run.rows:
        step = int(number(row["step"]) or 0)
        step_seconds = number(row.get("perf/step_s"))
        if step_seconds is not None:
            pace = step_seconds + (number(row.get("perf/data_s")) or 0.0)
        seconds += (step - timed) * pace
        timed = step
        seconds += sum(number(row.get(f"perf/{part}_s")) or 0.0 for part in ("ckpt", "val"))
        value, tokens = number(row.get(metric)), number(row.get("data/tokens"))
        if value is not None and tokens is not None:
            yield Sample(step, tokens, seconds, value)


def smoothed(samples: Sequence[Sample]) -> list[Sample]:
    """Applies ``SMOOTHING`` to the values. There are fewer neighbours at the ends, and values that are not finite do
    not count."""
    half = max(1, len(samples) // 20)
    means = [spread(one.value for one in samples[max(0, i - half) : i + half + 1]) for i in range(len(samples))]
    return [replace(one, value=mean.mean) for one, mean in zip(samples, means, strict=True) if mean is not None]


def curve(runs: Sequence[Run], metric: str) -> list[CurvePoint]:
    """The steps at which every run logged ``metric``; values that are not finite are left out of the mean. Metrics of
    training, each of a single step, are smoothed."""
    samples = [list(logged(run, metric)) for run in runs]
    if metric.startswith("train/"):
        samples = list(map(smoothed, samples))
    by_step = [{one.step: one for one in of_run} for of_run in samples]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))) if by_step else []:
        at_step = [of_run[step] for of_run in by_step]
        if (found := spread(one.value for one in at_step)) is not None:
            points.append(
                CurvePoint(fmean(one.tokens for one in at_step), fmean(one.seconds for one in at_step), found)
            )
    return points


def training_metric(quality: str) -> str:
    """The training metric that corresponds to a validation metric."""
    return "train/bpb" if quality == "val/bpb" else "train/loss"


def plotted_metric(configurations: Sequence[Sequence[Run]], quality: str) -> str:
    """The validation metric if all runs were validated more than once during training, else its training metric. Runs
    without metrics do not count."""
    training = training_metric(quality)
    validated = [len(curve(runs, quality)) > 1 for runs in configurations]
    trained = [len(curve(runs, training)) > 1 for runs in configurations]
    return training if any(t and not v for t, v in zip(trained, validated, strict=True)) else quality


def value_limits(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Limits of an axis of losses, from (tokens, value): the first quarter of each curve, and one that diverges, may
    exceed them, so that they do not flatten the rest."""
    later = [value for points in curves for tokens, value in points if tokens >= points[-1][0] / 4]
    low, middle, high = min(later), sorted(later)[len(later) // 2], max(later)
    high = min(high, max(low, 2 * middle))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def learning_curves(comparison: Comparison) -> Drawing | None:
    """By tokens and by seconds; None if no run was measured twice during training."""
    quality, configurations = comparison.quality, comparison.configurations
    metric = plotted_metric([one.runs for one in configurations], quality.key)
    curves = [points if len(points := curve(one.runs, metric)) > 1 else [] for one in configurations]
    drawn = [points for points in curves if points]
    if not drawn:
        return None
    tokens = scale([max(point.tokens for point in points) for points in drawn], "count")
    seconds = scale([max(point.seconds for point in points) for points in drawn], "seconds")

    def paint(figure: Figure, axes: list[Axes]) -> None:
        for index, points in reversed([*enumerate(curves)]):
            means, stds = [point.value.mean for point in points], [point.value.std for point in points]
            if points:
                line(axes[0], index, [point.tokens / tokens.size for point in points], means, stds)
                line(axes[1], index, [point.seconds / seconds.size for point in points], means, stds)
        axes[0].set(xlabel=tokens_label(tokens))
        axes[1].set(xlabel=time_label(seconds))
        for axis in axes:
            axis.set(ylabel=_curve_label(metric, quality))
            axis.set_xlim(left=0)
            if quality.better == "less" or metric != quality.key:
                axis.set_ylim(*value_limits([[(one.tokens, one.value.mean) for one in points] for points in drawn]))
            else:
                limit_shares(axis, quality)
        numbered_legend(figure, comparison)

    note = "Validation."
    if metric != quality.key:
        note = f"Training, as not every run was validated twice; each value is a {SMOOTHING}."
    missing = [one for one, points in zip(configurations, curves, strict=True) if not points]
    return draw(2, paint, note + (f" Measured fewer than two times, not drawn: {some(missing)}." if missing else ""))


def _curve_label(metric: str, quality: Metric) -> str:
    if metric == quality.key:
        return f"{quality.title}, validation"
    name, unit = ("bits per byte", "") if metric == "train/bpb" else ("loss", "nats/target, ")
    return f"{name}, training ({unit}running mean)"


def numbered_legend(figure: Figure, comparison: Comparison) -> None:
    """The configurations with their numbers in the table."""
    legend(figure, [f"{i} {one.name}" for i, one in enumerate(comparison.configurations, 1)])


def accuracy_curves(comparison: Comparison, title: str, values: Sequence[ByLength]) -> Drawing:
    """values: of each configuration, a share (0 to 1) by length."""

    def paint(figure: Figure, axes: list[Axes]) -> None:
        axis = axes[0]
        for index, by_length in reversed([*enumerate(values)]):
            means, stds = [one.mean for one in by_length.values()], [one.std for one in by_length.values()]
            line(axis, index, list(map(float, by_length)), means, stds)
        axis.set_xscale("log", base=2)
        _ticks(axis, sorted({float(length) for by_length in values for length in by_length}))
        axis.set(xlabel="length (tokens)", ylabel=f"{title} (share of 1)", ylim=(-0.02, 1.02))
        numbered_legend(figure, comparison)

    return draw(1, paint)


def numeric_settings(comparison: Comparison) -> list[str]:
    """Columns worth a plot: three or more numbers, and some line with two or more points."""
    ranked, found = [one for one, _ in comparison.ranked()], []
    for place, column in enumerate(comparison.columns):
        values = {parsed_number(one.settings[place]) for one in ranked}
        lines = Counter(comparison.name_of(one.settings, (column, *comparison.tuned)) for one in ranked)
        if column not in comparison.tuned and None not in values and len(values) > 2 and max(lines.values()) > 1:
            found.append(column)
    return found


def quality_by_setting(comparison: Comparison, column: str) -> Drawing:
    """Quality by the setting ``column``, a line for each combination of the other settings, the one with the best
    configuration first."""
    lines: dict[str, list[tuple[float, Spread]]] = defaultdict(list)
    place = comparison.columns.index(column)
    for one, quality in comparison.ranked():
        name = comparison.name_of(one.settings, (column, *comparison.tuned))
        lines[name].append((float(one.settings[place]), quality))

    def paint(figure: Figure, axes: list[Axes]) -> None:
        axis = axes[0]
        for index, points in reversed([*enumerate(lines.values())]):
            xs, values = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            line(axis, index, xs, [value.mean for value in values], [value.std for value in values])
        ticks = sorted({x for points in lines.values() for x, _ in points})
        if ticks[0] > 0 and ticks[-1] >= 4 * ticks[0]:
            axis.set_xscale("log")
        _ticks(axis, ticks)
        axis.set(xlabel=column, ylabel=comparison.quality.label)
        limit_shares(axis, comparison.quality)
        if any(lines):  # a single line has no name if nothing else was varied
            legend(figure, list(lines))

    return draw(1, paint)


def _ticks(axis: Axes, values: Sequence[float]) -> None:
    """At the values themselves, unless there are many."""
    if len(values) <= _MAX_TICKS:
        axis.set_xticks(values)
        axis.minorticks_off()
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")

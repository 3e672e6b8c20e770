"""Curves with their spread over seeds: learning curves, accuracy by length, quality by a setting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridlm.report.comparison import Comparison
from hybridlm.report.evaluations import ByLength
from hybridlm.report.metrics import Spread, scale, spread
from hybridlm.report.plots.drawing import TIME, TOKENS, Drawing, draw, legend, limit_shares, lines
from hybridlm.report.runs import Run, number, parsed_number
from hybridlm.report.verdict import some

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
        if (step_seconds := number(row.get("perf/step_s"))) is not None:
            pace = step_seconds + (number(row.get("perf/data_s")) or 0.0)
        seconds += (step - timed) * pace
        seconds += sum(number(row.get(f"perf/{part}_s")) or 0.0 for part in ("ckpt", "val"))
        timed = step
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

    label, note = f"{quality.title}, validation", "Validation."
    if metric != quality.key:
        name, unit = ("bits per byte", "") if metric == "train/bpb" else ("loss", "nats/target, ")
        label = f"{name}, training ({unit}running mean)"
        note = f"Training, as not every run was validated twice; each value is a {SMOOTHING}."

    def paint(figure: Figure, axes: list[Axes]) -> None:
        lines(axes[0], [[(point.tokens / tokens.size, point.value) for point in points] for points in curves])
        lines(axes[1], [[(point.seconds / seconds.size, point.value) for point in points] for points in curves])
        axes[0].set(xlabel=tokens.label(TOKENS))
        axes[1].set(xlabel=seconds.label(TIME))
        for axis in axes:
            axis.set(ylabel=label)
            axis.set_xlim(left=0)
            if quality.better == "less" or metric != quality.key:
                axis.set_ylim(*value_limits([[(one.tokens, one.value.mean) for one in points] for points in drawn]))
            else:
                limit_shares(axis, quality)
        numbered_legend(figure, comparison)

    missing = [one for one, points in zip(configurations, curves, strict=True) if not points]
    return draw(2, paint, note + (f" Measured fewer than two times, not drawn: {some(missing)}." if missing else ""))


def numbered_legend(figure: Figure, comparison: Comparison) -> None:
    """The configurations with their numbers in the table."""
    legend(figure, [f"{i} {one.name}" for i, one in enumerate(comparison.configurations, 1)])


def accuracy_curves(comparison: Comparison, title: str, values: Sequence[ByLength]) -> Drawing:
    """values: of each configuration, a share (0 to 1) by length."""

    def paint(figure: Figure, axes: list[Axes]) -> None:
        axis = axes[0]
        lines(axis, [list(by_length.items()) for by_length in values])
        axis.set_xscale("log", base=2)
        _ticks(axis, sorted({float(length) for by_length in values for length in by_length}))
        axis.set(xlabel="length (tokens)", ylabel=f"{title} (share of 1)", ylim=(-0.02, 1.02))
        numbered_legend(figure, comparison)

    return draw(1, paint)


def settings_curves(comparison: Comparison) -> Iterator[tuple[str, Drawing]]:
    """Quality by each column worth a plot, with its name: three or more numbers, and a line with two or more points."""
    ranked = comparison.ranked()
    for column in [column for column in comparison.columns if column not in comparison.tuned]:
        numbers = {parsed_number(one.settings[column]) for one, _ in ranked}
        if len(numbers) > 2 and None not in numbers:
            points: dict[str, list[tuple[float, Spread]]] = defaultdict(list)
            for one, quality in ranked:
                name = comparison.name_of(one.settings, (column, *comparison.tuned))
                points[name].append((float(one.settings[column]), quality))
            if max(map(len, points.values())) > 1:
                yield column, _by_setting(comparison, column, points)


def _by_setting(comparison: Comparison, column: str, points: Mapping[str, list[tuple[float, Spread]]]) -> Drawing:
    """A line for each combination of the other settings, the one with the best configuration first."""
    ticks = sorted({x for of_name in points.values() for x, _ in of_name})

    def paint(figure: Figure, axes: list[Axes]) -> None:
        axis = axes[0]
        lines(axis, [sorted(of_name, key=lambda point: point[0]) for of_name in points.values()])
        if ticks[0] > 0 and ticks[-1] >= 4 * ticks[0]:
            axis.set_xscale("log")
        _ticks(axis, ticks)
        axis.set(xlabel=column, ylabel=comparison.quality.label)
        limit_shares(axis, comparison.quality)
        if any(points):  # a single line has no name if nothing else was varied
            legend(figure, list(points))

    return draw(1, paint)


def _ticks(axis: Axes, values: Sequence[float]) -> None:
    """At the values themselves, unless there are many."""
    if len(values) <= _MAX_TICKS:
        axis.set_xticks(values)
        axis.minorticks_off()
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")

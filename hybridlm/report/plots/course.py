"""The course of one run: loss, speed, learning rates and gradient norm as panels of one figure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridlm.report.metrics import Metric, scale
from hybridlm.report.plots.colours import COLOURS
from hybridlm.report.plots.curves import SMOOTHING, Sample, logged, smoothed, training_metric, value_limits
from hybridlm.report.plots.drawing import Drawing, colour, draw, time_label, tokens_label
from hybridlm.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAINING, _VALIDATION, _RAW = COLOURS[0], COLOURS[1], "#9cc3df"
_PEAK = 20  # times the median: a larger gradient norm makes the axis logarithmic
_RATE = "optim/lr/"


@dataclass(frozen=True)
class _Line:
    label: str
    samples: Sequence[Sample]
    colour: str
    width: float = 1.6
    marks: bool = False  # a marker at each sample


@dataclass(frozen=True)
class _Panel:
    """bottom, top: limits of the values; None: automatic. skipped: where steps were skipped, by their number so far."""

    label: str
    lines: Sequence[_Line]
    by_time: bool = False
    bottom: float | None = 0.0
    top: float | None = None
    logarithmic: bool = False
    skipped: Sequence[Sample] = ()


def course(run: Run, quality: Metric) -> Drawing | None:
    """quality: the metric that ranks the run. None if nothing was logged twice."""
    panels = [panel for panel in _panels(run, quality) if any(len(line.samples) > 1 for line in panel.lines)]
    samples = [one for panel in panels for line in panel.lines for one in line.samples]
    if not samples:
        return None
    tokens = scale([max(one.tokens for one in samples)], "count")
    seconds = scale([max(one.seconds for one in samples)], "seconds")

    def paint(figure: Figure, axes: list[Axes]) -> None:
        for axis, panel in zip(axes, panels, strict=True):
            for line in filter(lambda one: one.samples, panel.lines):
                by_time = [one.seconds / seconds.size for one in line.samples]
                by_tokens = [one.tokens / tokens.size for one in line.samples]
                axis.plot(
                    by_time if panel.by_time else by_tokens,
                    [one.value for one in line.samples],
                    color=line.colour,
                    linewidth=line.width,
                    label=line.label,
                    marker="o" if line.marks and len(line.samples) <= 40 else None,
                    markersize=4,
                )
            for one in panel.skipped:
                label = f"skipped steps ({one.value:.0f})" if one is panel.skipped[-1] else None
                axis.axvline(one.tokens / tokens.size, color=COLOURS[1], linewidth=0.8, label=label)
            axis.set(xlabel=time_label(seconds) if panel.by_time else tokens_label(tokens), ylabel=panel.label)
            axis.set_xlim(left=0)
            if panel.logarithmic:
                axis.set_yscale("log")
                axis.yaxis.set_minor_formatter(lambda value, _: "")
            else:
                axis.set_ylim(panel.bottom, panel.top)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            axis.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=3,
                frameon=False,
                borderaxespad=0,
                handlelength=1.5,
                fontsize=9,
            )

    return draw(len(panels), paint, f"Smoothed: {SMOOTHING}.")


def _panels(run: Run, quality: Metric) -> Iterator[_Panel]:
    yield _losses(run, quality)
    if quality.better == "more":  # has no training counterpart
        shares = _Line("validation", list(logged(run, quality.key)), _VALIDATION, marks=True)
        yield _Panel(quality.label, [shares], top=1.02)
    speed = list(logged(run, "perf/tokens_per_s"))
    lines = [_Line("as logged", speed, _RAW, 0.8), _Line("smoothed", smoothed(speed), _TRAINING)]
    yield _Panel("training speed (tokens/s)", lines, by_time=True)
    yield _Panel("learning rate", list(_rates(run)))
    norms = _Line("as logged", list(logged(run, "optim/grad_norm")), _TRAINING, 0.8)  # smoothing would flatten peaks
    positive = [one.value for one in norms.samples if one.value > 0]
    yield _Panel(
        "gradient norm before clipping",
        [norms],
        logarithmic=bool(positive) and max(positive) > _PEAK * statistics.median(positive),
        skipped=_skipped(run),
    )


def _losses(run: Run, quality: Metric) -> _Panel:
    """Training, as logged and smoothed, and validation, in the same unit."""
    metric = training_metric(quality.key)
    trained = list(logged(run, metric))
    validated = list(logged(run, "val/bpb" if metric == "train/bpb" else "val/loss"))
    lines = [
        _Line("training", trained, _RAW, 0.8),
        _Line("smoothed", smoothed(trained), _TRAINING),
        _Line("validation", validated, _VALIDATION, marks=True),
    ]
    curves = [[(one.tokens, one.value) for one in line.samples] for line in lines if line.samples]
    bottom, top = value_limits(curves) if curves else (None, None)
    return _Panel("bits per byte" if metric == "train/bpb" else "loss (nats/target)", lines, bottom=bottom, top=top)


def _rates(run: Run) -> Iterator[_Line]:
    """A line for each learning rate; parameter groups with the same one share it."""
    keys = dict.fromkeys(key for row in run.rows for key in row if key.startswith(_RATE))
    groups: dict[tuple[Sample, ...], list[str]] = defaultdict(list)
    for key in [*keys] or ["optim/lr"]:
        groups[tuple(logged(run, key))].append(key.removeprefix(_RATE))
    for i, (samples, names) in enumerate(groups.items()):
        yield _Line(", ".join(names), samples, colour(i))


def _skipped(run: Run) -> list[Sample]:
    """The rows with more skipped steps than the row before."""
    counts = list(logged(run, "optim/skipped_steps"))
    before = [0.0, *(one.value for one in counts)]
    return [one for one, earlier in zip(counts, before, strict=False) if one.value > earlier]

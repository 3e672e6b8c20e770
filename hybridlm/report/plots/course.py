"""The course of one run: loss, speed, learning rates and gradient norm as panels of one figure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridlm.report.metrics import Metric, scale
from hybridlm.report.plots.curves import SMOOTHING, Sample, logged, smoothed, training_metric, value_limits
from hybridlm.report.plots.drawing import COLOURS, TIME, TOKENS, Drawing, colour, draw
from hybridlm.report.runs import Run

_PEAK = 20  # times the median: a larger gradient norm makes the axis logarithmic
_MAX_MARKS = 40
_RATE = "optim/lr/"
_LOGGED = {"color": "#9cc3df", "linewidth": 0.8}
_SMOOTHED = {"color": COLOURS[0], "linewidth": 1.6}
_VALIDATED = {"color": COLOURS[1], "linewidth": 1.6, "marker": "o"}
Line = tuple[str, Sequence[Sample], Mapping[str, Any]]  # label, values, style


@dataclass(frozen=True)
class _Panel:
    """limits: of the values, None: automatic. skipped: where steps were skipped, by their number so far."""

    label: str
    lines: Sequence[Line]
    by_time: bool = False
    limits: tuple[float | None, float | None] = (0.0, None)
    logarithmic: bool = False
    skipped: Sequence[Sample] = ()


def course(run: Run, quality: Metric) -> Drawing | None:
    """quality: the metric that ranks the run. None if nothing was logged twice."""
    panels = [panel for panel in _panels(run, quality) if any(len(samples) > 1 for _, samples, _ in panel.lines)]
    everything = [one for panel in panels for _, samples, _ in panel.lines for one in samples]
    if not everything:
        return None
    tokens = scale([max(one.tokens for one in everything)], "count")
    seconds = scale([max(one.seconds for one in everything)], "seconds")

    def paint(figure: Figure, axes: list[Axes]) -> None:
        for axis, panel in zip(axes, panels, strict=True):
            for label, samples, style in panel.lines:
                xs = [one.seconds / seconds.size if panel.by_time else one.tokens / tokens.size for one in samples]
                shown = {**style, "marker": style.get("marker") if len(samples) <= _MAX_MARKS else None}
                if samples:
                    axis.plot(xs, [one.value for one in samples], label=label, markersize=4, **shown)
            for one in panel.skipped:
                label = f"skipped steps ({one.value:.0f})" if one is panel.skipped[-1] else ""
                axis.axvline(one.tokens / tokens.size, color=COLOURS[1], linewidth=0.8, label=label or None)
            axis.set(xlabel=seconds.label(TIME) if panel.by_time else tokens.label(TOKENS), ylabel=panel.label)
            axis.set_xlim(left=0)
            if panel.logarithmic:
                axis.set_yscale("log")
                axis.yaxis.set_minor_formatter(lambda value, _: "")
            else:
                axis.set_ylim(*panel.limits)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
            axis.legend(**place, ncols=3, frameon=False, handlelength=1.5, fontsize=9)

    return draw(len(panels), paint, f"Smoothed: {SMOOTHING}.")


def _panels(run: Run, quality: Metric) -> Iterator[_Panel]:
    training = training_metric(quality.key)
    trained = list(logged(run, training))
    validated = list(logged(run, "val/bpb" if training == "train/bpb" else "val/loss"))
    lines: list[Line] = [
        ("training", trained, _LOGGED),
        ("smoothed", smoothed(trained), _SMOOTHED),
        ("validation", validated, _VALIDATED),
    ]
    curves = [[(one.tokens, one.value) for one in samples] for _, samples, _ in lines if samples]
    label = "bits per byte" if training == "train/bpb" else "loss (nats/target)"
    yield _Panel(label, lines, limits=value_limits(curves) if curves else (None, None))
    if quality.better == "more":  # has no training counterpart
        shares = list(logged(run, quality.key))
        yield _Panel(quality.label, [("validation", shares, _VALIDATED)], limits=(0.0, 1.02))
    speed = list(logged(run, "perf/tokens_per_s"))
    lines = [("as logged", speed, _LOGGED), ("smoothed", smoothed(speed), _SMOOTHED)]
    yield _Panel("training speed (tokens/s)", lines, by_time=True)
    yield _Panel("learning rate", list(_rates(run)))
    norms = list(logged(run, "optim/grad_norm"))
    positive = [one.value for one in norms if one.value > 0]
    steep = bool(positive) and max(positive) > _PEAK * statistics.median(positive)
    counts = list(logged(run, "optim/skipped_steps"))
    before = [0.0, *(one.value for one in counts)]
    skipped = [one for one, earlier in zip(counts, before, strict=False) if one.value > earlier]
    unsmoothed = ("as logged", norms, {**_LOGGED, "color": COLOURS[0]})  # a mean would flatten peaks
    yield _Panel("gradient norm before clipping", [unsmoothed], logarithmic=steep, skipped=skipped)


def _rates(run: Run) -> Iterator[Line]:
    """A line for each learning rate; parameter groups with the same one share it."""
    keys = dict.fromkeys(key for row in run.rows for key in row if key.startswith(_RATE))
    groups: dict[tuple[Sample, ...], list[str]] = defaultdict(list)
    for key in [*keys] or ["optim/lr"]:
        groups[tuple(logged(run, key))].append(key.removeprefix(_RATE))
    for i, (samples, names) in enumerate(groups.items()):
        yield ", ".join(names), samples, {"color": colour(i), "linewidth": 1.6}

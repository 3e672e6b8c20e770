"""The course of one run: loss, speed, learning rates, gradients, as panels of one drawing."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridlm.report.facts import number
from hybridlm.report.measures import Measure
from hybridlm.report.plots.colours import COLOURS
from hybridlm.report.plots.curves import SMOOTHING, Place, interesting, smoothed, track, trained_metric
from hybridlm.report.plots.drawing import GREY, Drawing, draw, quality_label, tokens_label
from hybridlm.report.reading import Run
from hybridlm.report.table import scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAINED, _VALIDATED, _RAW = COLOURS[0], COLOURS[1], "#9cc3df"
_WIDE = 20  # times its median, from which on the largest gradient has an axis of logarithms
_RATE = "optim/lr/"


@dataclass(frozen=True)
class _Line:
    label: str
    places: Sequence[Place]
    colour: str
    width: float = 1.6
    marks: bool = False  # a mark at each place


@dataclass(frozen=True)
class _Panel:
    """bottom: where the axis of values begins; None: at the values. at: tokens at which something happened, which
    ``what`` names."""

    label: str
    lines: tuple[_Line, ...]
    by_time: bool = False
    bottom: float | None = None
    top: float | None = None
    logarithmic: bool = False
    at: tuple[float, ...] = ()
    what: str = ""


def course(run: Run, quality: Measure) -> Drawing | None:
    """quality: by which the run is judged. None where nothing was logged twice."""
    panels = [panel for panel in _panels(run, quality) if any(len(line.places) > 1 for line in panel.lines)]
    if not panels:
        return None
    everything = [place for panel in panels for line in panel.lines for place in line.places]
    tokens, seconds = (
        scale([max(one.tokens for one in everything)], "count"),
        scale([max(one.seconds for one in everything)], "seconds"),
    )

    def paint(figure: Figure, axes: list[Axes]) -> None:
        for axis, panel in zip(axes, panels, strict=True):
            for line in filter(lambda one: one.places, panel.lines):
                places = [
                    one.seconds / seconds.size if panel.by_time else one.tokens / tokens.size for one in line.places
                ]
                mark = "o" if line.marks and len(places) <= 40 else None
                values = [one.value for one in line.places]
                axis.plot(
                    places, values, color=line.colour, linewidth=line.width, label=line.label, marker=mark, markersize=4
                )
            for i, place in enumerate(panel.at):
                axis.axvline(place / tokens.size, color=COLOURS[1], linewidth=0.8, label=panel.what if i == 0 else None)
            axis.set(
                xlabel=f"time of training ({seconds.unit})" if panel.by_time else tokens_label(tokens),
                ylabel=panel.label,
            )
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


def _panels(run: Run, quality: Measure) -> Iterator[_Panel]:
    yield _losses(run, quality)
    if quality.better == "more":  # which no loss of training can stand beside
        shares = _Line("validation", list(track(run, quality.key)), _VALIDATED, marks=True)
        yield _Panel(quality_label(quality), (shares,), bottom=0.0, top=1.02)
    speed = list(track(run, "perf/tokens_per_s"))
    yield _Panel(
        "training speed (tokens/s)",
        (_raw(speed), _Line("smoothed", smoothed(speed), _TRAINED)),
        by_time=True,
        bottom=0.0,
    )
    yield _Panel("learning rate", tuple(_rates(run)), bottom=0.0)
    norms = list(track(run, "optim/grad_norm"))
    high = [place.value for place in norms if place.value > 0]
    wide = bool(high) and max(high) > _WIDE * statistics.median(high)
    what = f"steps were skipped ({_last(run, 'optim/skipped_steps'):.0f})"
    lines = (_Line("as logged", norms, _TRAINED, 0.8),)  # a mean would make a hill of a peak
    yield _Panel(
        "gradient norm before clipping",
        lines,
        bottom=None if wide else 0.0,
        logarithmic=wide,
        at=tuple(_skipped(run)),
        what=what,
    )


def _losses(run: Run, quality: Measure) -> _Panel:
    """Of training, as it is and smoothed, and of validations, in the same unit."""
    metric = trained_metric(quality.key)
    validated = "val/bpb" if metric == "train/bpb" else "val/loss"
    trained, checked = list(track(run, metric)), list(track(run, validated))
    lines = (
        _raw(trained, "training"),
        _Line("smoothed", smoothed(trained), _TRAINED),
        _Line("validation", checked, _VALIDATED, marks=True),
    )
    curves = [[(one.tokens, one.value) for one in line.places] for line in lines if line.places]
    bottom, top = interesting(curves) if curves else (None, None)
    return _Panel("bits per byte" if metric == "train/bpb" else "loss (nats/target)", lines, bottom=bottom, top=top)


def _raw(places: Sequence[Place], label: str = "as logged") -> _Line:
    return _Line(label, places, _RAW, 0.8)


def _rates(run: Run) -> Iterator[_Line]:
    """A line for each rate; parameters of the same one share it."""
    roles = dict.fromkeys(key for row in run.rows for key in row if key.startswith(_RATE))
    together: dict[tuple[Place, ...], list[str]] = defaultdict(list)
    for role in [*roles] or ["optim/lr"]:
        together[tuple(track(run, role))].append(role.removeprefix(_RATE))
    for i, (places, names) in enumerate(together.items()):
        yield _Line(", ".join(names), places, COLOURS[i] if i < len(COLOURS) else GREY)


def _skipped(run: Run) -> Iterator[float]:
    """Tokens at the rows in which there are more skipped steps than before."""
    before = 0.0
    for place in track(run, "optim/skipped_steps"):
        if place.value > before:
            yield place.tokens
        before = place.value


def _last(run: Run, metric: str) -> float:
    return next((found for row in reversed(run.rows) if (found := number(row.get(metric))) is not None), 0.0)

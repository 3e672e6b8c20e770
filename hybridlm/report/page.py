"""The page: one HTML file that needs nothing beside it, and the same as Markdown."""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridlm.errors import printable
from hybridlm.report.cautions import cautions
from hybridlm.report.comparison import Comparison
from hybridlm.report.evaluations import evaluation_table, lengths_table, lengthwise
from hybridlm.report.measures import Measure
from hybridlm.report.plots.course import course
from hybridlm.report.plots.drawing import Drawing
from hybridlm.report.plots.lines import by_length, by_setting, learning, numeric_settings, shares
from hybridlm.report.plots.tradeoffs import tradeoffs
from hybridlm.report.reading import Run, Sweep, shown
from hybridlm.report.repeat import command_of, differing
from hybridlm.report.setup import setup_table
from hybridlm.report.table import Table, markdown, points_table, to_markdown
from hybridlm.report.verdict import outcome, quality_text, verdict

_TEMPLATE = "page.html"
_SETTINGS_SHOWN = 30
_COSTS = (
    "Means over seeds; bars are standard deviations. The broken line is the Pareto front: no point is better in both"
    " respects."
)
_TIME = (
    "The first quarter of a curve of losses may lie above the plot. Time is that of steps, data, validations and"
    " checkpoints."
)
_LEARNING = f"Means over seeds, with a band of one standard deviation. {_TIME}"
_BY_SETTING = (
    "Means over seeds, with a band of one standard deviation. A line has the settings of its name; its colour is of"
    " this plot only."
)
_BY_LENGTH = "Means over seeds, with a band of one standard deviation."
SPREAD = (
    "± is the standard deviation over the runs of a point (its seeds). A difference to the best that is no larger than"
    " the pooled standard deviation of the two points is printed as no difference; where neither was repeated, that of"
    " all points counts. A question mark: nothing was repeated, and the spread is unknown. A rule of thumb, no test of"
    " significance: few seeds measure a spread poorly."
)


@dataclass(frozen=True)
class Plot:
    """file: its name beside report.md, which cannot hold it; the page does. table: its numbers, where the points' own
    table lacks them."""

    title: str
    caption: str
    drawing: Drawing
    file: str
    table: Table | None = None

    @property
    def said(self) -> str:
        """All that stands below it."""
        return f"{self.drawing.note} {self.caption}".strip()

    @property
    def sources(self) -> tuple[str, str]:
        """Data URIs: for a wide window, and for a narrow one."""
        wide, narrow = (base64.b64encode(svg.encode()).decode() for svg in (self.drawing.wide, self.drawing.narrow))
        return f"data:image/svg+xml;base64,{wide}", f"data:image/svg+xml;base64,{narrow}"


@dataclass(frozen=True)
class RunEntry:
    """What stands about one run on its own. point: its settings in a line; link: from the page to the run's folder."""

    run: Run
    point: str
    quality: str
    settings: tuple[str, ...]
    command: str
    link: str

    @property
    def texts(self) -> list[tuple[str, str]]:
        """What the run has written, those that there are."""
        texts = [("layers", self.run.layers), ("samples", self.run.samples), ("plan", self.run.plan)]
        return [(title, text) for title, text in texts if text]


@dataclass(frozen=True)
class Part:
    """A comparison as it is shown; where it is of one run, that run's course and settings. spread: what the table's ±
    mean, if any."""

    comparison: Comparison
    title: str
    verdict: list[str]
    cautions: list[str]
    table: Table
    spread: str
    evaluations: Table | None
    plots: list[Plot]
    entries: list[RunEntry]

    @property
    def alone(self) -> bool:
        return len(self.comparison.runs) == 1


def parts_of(comparisons: Sequence[Comparison], out: Path) -> list[Part]:
    """out: the folder in which the page will lie."""
    parts = []
    for number, comparison in enumerate(comparisons, 1):
        keys = differing(comparison.runs)
        entries = [_entry(run, comparison, keys, out) for run in comparison.runs]
        if len(comparison.runs) == 1:
            (run,) = comparison.runs
            title, said, table, spread = (
                f"{comparison.title}: run {run.name}",
                outcome(run, comparison.quality),
                setup_table(run),
                "",
            )
            plots = _course(run, comparison.quality, number)
        else:
            title, said, table, spread = comparison.title, verdict(comparison), points_table(comparison), SPREAD
            plots = _plots(comparison, number)
        plots += _by_length(comparison, number)
        parts.append(
            Part(
                comparison,
                title,
                said,
                cautions(comparison),
                table,
                spread,
                evaluation_table(comparison),
                plots,
                entries,
            )
        )
    return parts


def facts_of(runs: Sequence[Run], sweeps: Sequence[Sweep], command: str, when: str) -> list[tuple[str, str]]:
    """The head of the page: what, when, where, by which command."""
    counts = Counter(run.status for run in runs)
    devices = sorted({shown(run.summary["device"]) for run in runs if run.summary.get("device")})
    versions = sorted({shown(run.summary["torch"]) for run in runs if run.summary.get("torch")})
    spent = sum(run.seconds or 0.0 for run in runs)
    facts = [
        ("runs", f"{len(runs)}: " + ", ".join(f"{count} {status}" for status, count in counts.most_common())),
        ("machine", "; ".join(devices) + (f"; torch {', '.join(versions)}" if versions else "")),
        ("time of all runs", "" if not spent else f"{spent:,.0f} s" if spent < 600 else f"{spent / 3600:,.2f} h"),
        *(("sweep", f"{sweep.command or sweep.folder.name}") for sweep in sweeps),
        ("made", f"{when} by {command}"),
    ]
    return [(name, text) for name, text in facts if text]


def to_html(parts: Sequence[Part], facts: Sequence[tuple[str, str]]) -> str:
    """Every text in it is escaped by the template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(parts=parts, facts=facts, apart=_apart(parts))


def to_text(parts: Sequence[Part], facts: Sequence[tuple[str, str]]) -> str:
    """Markdown: the head, the verdicts, the tables, and the plots by their files."""
    lines = ["# Report", "", *(f"- {name}: {markdown(text)}" for name, text in facts), ""]
    lines += [f"{said}\n" for said in [_apart(parts)] if said]
    for part in parts:
        lines += [f"## {markdown(part.title)}", "", " ".join(map(markdown, part.verdict)), ""]
        lines += [f"**Caution.** {markdown(caution)}\n" for caution in part.cautions]
        lines += [f"{markdown(note)}\n" for note in part.comparison.notes]
        lines += [] if part.alone else [to_markdown(part.table), part.spread, ""]
        for plot in part.plots:
            lines += [
                f"### {markdown(plot.title)}",
                "",
                f"![{markdown(plot.title)}]({plot.file})",
                "",
                markdown(plot.said),
                "",
            ]
            lines += [] if plot.table is None else [to_markdown(plot.table)]
        lines += ["### How it was set up", "", to_markdown(part.table)] if part.alone else []
        if part.evaluations is not None:
            lines += ["### Evaluations", "", to_markdown(part.evaluations)]
        lines += ["### Run" if part.alone else "### Runs", ""]
        for entry in part.entries:
            figure = f", {part.comparison.quality.title} {entry.quality}" if entry.quality else ""
            lines += [
                markdown(f"{entry.run.name}: {entry.point}: {entry.run.status}{figure}"),
                "",
                f"    {printable(entry.command)}",
                "",
            ]
            for title, text in entry.texts if part.alone else ():
                lines += [
                    f"#### {title.capitalize()}",
                    "",
                    *(f"    {printable(line)}" for line in text.split("\n")),
                    "",
                ]
    return "\n".join(lines)


def _apart(parts: Sequence[Part]) -> str:
    if len(parts) < 2:
        return ""
    return (
        f"The runs were validated on {len(parts)} different texts or tasks. They are ranked within each, and do not"
        " compare across them."
    )


def _entry(run: Run, comparison: Comparison, keys: Sequence[str], out: Path) -> RunEntry:
    figure = comparison.quality.of(run)
    settings = [f"{key} = {value}" for key in keys if (value := run.setting(key)) is not None]
    if len(settings) > _SETTINGS_SHOWN:
        settings[_SETTINGS_SHOWN:] = [f"and {len(settings) - _SETTINGS_SHOWN} more"]
    link = Path(os.path.relpath(run.folder.resolve(), out.resolve())).as_posix()
    point = ", ".join([*comparison.settings_of(run), *([] if run.seed is None else [f"seed {run.seed}"])])
    return RunEntry(
        run,
        point,
        "" if figure is None else quality_text(figure, comparison.quality),
        tuple(settings),
        command_of(run),
        link,
    )


def _plots(comparison: Comparison, number: int) -> list[Plot]:
    """number: of the comparison on the page, from 1."""
    found = [
        ("costs", "What it costs", _COSTS, tradeoffs(comparison)),
        ("learning", "Learning", _LEARNING, learning(comparison)),
    ]
    for place, column in enumerate(numeric_settings(comparison), 1):
        found.append((f"setting-{place}", f"By setting: {column}", _BY_SETTING, by_setting(comparison, column)))
    return [
        Plot(title, caption, drawing, f"report-{number}-{name}.svg")
        for name, title, caption, drawing in found
        if drawing is not None
    ]


def _course(run: Run, quality: Measure, number: int) -> list[Plot]:
    drawing = course(run, quality)
    return [] if drawing is None else [Plot("Course of the run", _TIME, drawing, f"report-{number}-course.svg")]


def _by_length(comparison: Comparison, number: int) -> list[Plot]:
    plots = []
    for place, (title, of_runs) in enumerate(lengthwise(comparison.runs).items(), 1):
        values, file = shares(comparison.points, of_runs), f"report-{number}-length-{place}.svg"
        table = lengths_table(comparison, values)
        plots.append(Plot(f"By length: {title}", _BY_LENGTH, by_length(comparison, title, values), file, table))
    return plots

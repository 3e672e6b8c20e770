"""Renders a report as one self-contained HTML page, and the same as Markdown."""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridlm.errors import printable
from hybridlm.report.comparison import Comparison
from hybridlm.report.evaluations import accuracy_by_length, evaluation_table, lengths_table
from hybridlm.report.plots.course import course
from hybridlm.report.plots.curves import accuracy_curves, learning_curves, numeric_settings, quality_by_setting
from hybridlm.report.plots.drawing import Drawing
from hybridlm.report.plots.tradeoffs import tradeoffs
from hybridlm.report.run_files import SweepRecord
from hybridlm.report.runs import Run, as_text
from hybridlm.report.single_run import outcome, setup_table
from hybridlm.report.table import Table, configurations_table, markdown, to_markdown
from hybridlm.report.verdict import cautions, notes, verdict

_MAX_SETTINGS = 30
_SPREAD = (
    "± is the standard deviation over the runs (seeds) of a configuration. “No difference” means that the difference"
    " from the best is at most the pooled standard deviation of the two configurations; if neither was repeated, that"
    " of all configurations counts. A question mark means that nothing was repeated, so the spread is unknown. This is"
    " a rule of thumb, not a test of significance: a few seeds estimate the spread poorly."
)
_COSTS = (
    "Means over seeds; bars are standard deviations. The dashed line is the Pareto front: no configuration is better in"
    " both respects."
)
_BAND = "Means over seeds, with a band of one standard deviation."
_TIME = "The first quarter of a loss curve may exceed the plot. Time includes data, validations and checkpoints."
_BY_SETTING = f"{_BAND} Each line has the settings of its label; its colour is specific to this plot."


@dataclass(frozen=True)
class Plot:
    """file: its name beside report.md; the HTML page embeds it. table: its numbers, if the main table lacks them."""

    title: str
    caption: str
    drawing: Drawing
    file: str
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A comparison as it is shown; if it has a single run, that run's course and setup.

    runs: each run with its heading, the settings in which it differs from others, and the link to its folder.
    """

    comparison: Comparison
    title: str
    verdict: list[str]
    cautions: list[str]
    notes: list[str]
    table: Table
    evaluations: Table | None
    plots: list[Plot]
    runs: list[tuple[Run, str, list[str], str]]

    @property
    def alone(self) -> bool:
        return len(self.comparison.runs) == 1


def sections_of(comparisons: Sequence[Comparison], out: Path) -> list[Section]:
    """out: the folder of the page, from which it links to the runs."""
    sections = []
    for index, comparison in enumerate(comparisons, 1):
        first, *others = comparison.runs
        if others:
            title, sentences, table = comparison.title, verdict(comparison), configurations_table(comparison)
        else:
            title = f"{comparison.title}: run {first.name}"
            sentences, table = outcome(first, comparison.quality), setup_table(first)
        remarks = notes(comparison) if others else []
        plots, evaluations = _plots(comparison, f"report-{index}"), evaluation_table(comparison)
        keys = _differing(comparison.runs)
        runs = [(run, _heading(run, comparison), _shown(run, keys), _link(run, out)) for run in comparison.runs]
        sections.append(
            Section(comparison, title, sentences, cautions(comparison), remarks, table, evaluations, plots, runs)
        )
    return sections


def header(runs: Sequence[Run], sweeps: Sequence[SweepRecord], command: str, when: str) -> list[tuple[str, str]]:
    """The head of the page: what, when, where, by which command."""
    counts = Counter(run.status for run in runs).most_common()
    devices, versions = (
        sorted({as_text(run.summary[key]) for run in runs if run.summary.get(key)}) for key in ("device", "torch")
    )
    spent = sum(run.seconds or 0.0 for run in runs)
    lines = [
        ("runs", f"{len(runs)}: " + ", ".join(f"{count} {status}" for status, count in counts)),
        ("machine", "; ".join(devices) + (f"; torch {', '.join(versions)}" if versions else "")),
        ("total time", "" if not spent else f"{spent:,.0f} s" if spent < 600 else f"{spent / 3600:,.2f} h"),
        *(("sweep", sweep.command) for sweep in sweeps),
        ("created", f"{when} by {command}"),
    ]
    return [(name, text) for name, text in lines if text]


def to_html(sections: Sequence[Section], head: Sequence[tuple[str, str]]) -> str:
    """The template escapes every text in it."""
    return _rendered("page.html", sections, head, lambda svg: base64.b64encode(svg.encode()).decode())


def to_text(sections: Sequence[Section], head: Sequence[tuple[str, str]]) -> str:
    """Markdown, with links to the plots."""
    return _rendered("page.md", sections, head, lambda svg: "")


def _rendered(
    template: str, sections: Sequence[Section], head: Sequence[tuple[str, str]], embedded: Callable[[str], str]
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": markdown, "table": to_markdown, "printable": printable, "base64": embedded}
    return environment.get_template(template).render(sections=sections, head=head, spread=_SPREAD)


def _heading(run: Run, comparison: Comparison) -> str:
    seed = [] if run.seed is None else [f"seed {run.seed}"]
    value = comparison.quality.of(run)
    figure = "" if value is None else f", {comparison.quality.title} {comparison.quality.text(value)}"
    return f"{run.name}: {', '.join([*comparison.settings_of(run), *seed])}: {run.status}{figure}"


def _differing(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs that have a configuration differ, including the seed."""
    configured = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in configured for key in run.config)
    return [key for key in keys if len({run.setting(key) for run in configured}) > 1]


def _shown(run: Run, keys: Sequence[str]) -> list[str]:
    settings = [f"{key} = {run.setting(key)}" for key in keys if run.setting(key) is not None]
    return settings[:_MAX_SETTINGS] + [f"and {len(settings) - _MAX_SETTINGS} more"] * (len(settings) > _MAX_SETTINGS)


def _link(run: Run, out: Path) -> str:
    return Path(os.path.relpath(run.folder.resolve(), out.resolve())).as_posix()


def _plots(comparison: Comparison, prefix: str) -> list[Plot]:
    plots = []

    def add(name: str, title: str, caption: str, drawing: Drawing | None, table: Table | None = None) -> None:
        if drawing is not None:
            plots.append(Plot(title, caption, drawing, f"{prefix}-{name}.svg", table))

    if len(comparison.runs) == 1:
        add("course", "Course of the run", _TIME, course(comparison.runs[0], comparison.quality))
    else:
        add("costs", "Quality and cost", _COSTS, tradeoffs(comparison))
        add("learning", "Learning curves", f"{_BAND} {_TIME}", learning_curves(comparison))
        for i, column in enumerate(numeric_settings(comparison), 1):
            add(f"setting-{i}", f"By setting: {column}", _BY_SETTING, quality_by_setting(comparison, column))
    for i, (title, values) in enumerate(accuracy_by_length(comparison).items(), 1):
        drawing, table = accuracy_curves(comparison, title, values), lengths_table(comparison, values)
        add(f"length-{i}", f"By length: {title}", _BAND, drawing, table)
    return plots

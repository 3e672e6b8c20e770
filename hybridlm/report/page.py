"""`hybridlm report`: one self-contained HTML page, the same as Markdown, and a row per run as CSV."""

from __future__ import annotations

import base64
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hybridlm.errors import UserError, printable
from hybridlm.files.durable import replaced
from hybridlm.report.comparison import Comparison, best_of, compare
from hybridlm.report.evaluations import accuracy_by_length, evaluation_table, lengths_table
from hybridlm.report.plots.course import course
from hybridlm.report.plots.curves import accuracy_curves, learning_curves, settings_curves
from hybridlm.report.plots.drawing import Drawing
from hybridlm.report.plots.tradeoffs import tradeoffs
from hybridlm.report.runs import Run, as_text, read_folders
from hybridlm.report.table import (
    Table,
    configurations_table,
    markdown,
    setup_table,
    to_csv,
    to_markdown,
)
from hybridlm.report.verdict import cautions, notes, outcome, verdict
from hybridlm.runs.run_folder import find_run, newest_run
from hybridlm.sweep.job import Sweep

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


Section = dict[str, Any]  # what the templates show of a comparison


def run_report(names: list[str], out: Path | None, tuned: list[str] | None = None) -> None:
    """Writes report.html, report.md with its plots and report.csv into ``out`` (default: the first folder) and prints
    the verdict.

    names: folders, or ``last`` for the newest run; tuned: settings shown at their best value for each model.

    Raises:
        UserError: a folder is missing or holds no run, ``out`` cannot be written, or the runs do not differ in a
            setting of ``tuned``.
    """
    folders = [_folder(name) for name in names]
    runs, sweeps = read_folders(folders)
    target = folders[0] if out is None else out
    tuned = tuned or []
    options = ([] if out is None else ["--out", str(out)]) + [word for key in tuned for word in ("--best-of", key)]
    comparisons = compare(runs, [key for sweep in sweeps for key in sweep.varied])
    columns = dict.fromkeys(column for comparison in comparisons for column in comparison.columns)
    if unknown := next((key for key in tuned if key not in columns), None):
        raise UserError(
            f"--best-of {unknown}: these runs do not differ in it; they differ in {', '.join(columns) or 'nothing'}"
        )
    comparisons = [best_of(comparison, tuned) for comparison in comparisons]
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    head = header(runs, sweeps, shlex.join(["hybridlm", "report", *names, *options]), when)
    sections = sections_of(comparisons, target)
    texts = {plot["file"]: plot["drawing"].wide for section in sections for plot in section["plots"]}
    texts |= {f"report.{kind}": rendered(kind, sections, head) for kind in ("html", "md")}
    texts["report.csv"] = to_csv(comparisons)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replaced(target / name) as new:
                new.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"{target}: cannot write the report ({error.strerror}); choose a folder with --out") from None
    for section in sections:
        print(printable(f"{section['title']}: {' '.join(section['verdict'])}"))
        print("".join(f"caution: {printable(caution)}\n" for caution in section["cautions"]), end="")
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    print(f"\n{printable(str(target / 'report.html'))}, report.md with its plots, and report.csv: {count}")


def _folder(name: str) -> Path:
    if name != "last":
        return Path(name)
    newest = newest_run(Path.cwd())  # it may have no checkpoint yet
    return (find_run(name)[0] if newest is None else newest).path  # find_run says where it looked


def sections_of(comparisons: Sequence[Comparison], out: Path) -> list[Section]:
    """Each comparison, or, if it has a single run, that run's course and setup. out: the folder of the page, from which
    it links to the runs."""
    sections = []
    for index, comparison in enumerate(comparisons, 1):
        first, *others = comparison.runs
        section: Section = {"alone": not others, "cautions": cautions(comparison)}
        if others:
            section |= {"title": comparison.title, "verdict": verdict(comparison), "notes": notes(comparison)}
            section["table"] = configurations_table(comparison)
        else:
            section |= {"title": f"{comparison.title}: run {first.name}", "notes": []}
            section |= {"verdict": outcome(first, comparison.quality), "table": setup_table(first)}
        section["plots"] = _plots(comparison, f"report-{index}")
        section["evaluations"] = evaluation_table(comparison)
        section["runs"] = list(_runs(comparison, out))
        sections.append(section)
    return sections


def header(runs: Sequence[Run], sweeps: Sequence[Sweep], command: str, when: str) -> list[tuple[str, str]]:
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


def rendered(kind: str, sections: Sequence[Section], head: Sequence[tuple[str, str]]) -> str:
    """As ``html``, in which the template escapes every text, or as ``md``, with links to the plots."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=kind == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": markdown, "table": to_markdown, "printable": printable}
    environment.filters["base64"] = lambda svg: base64.b64encode(svg.encode()).decode()
    return environment.get_template(f"page.{kind}").render(sections=sections, head=head, spread=_SPREAD)


def _runs(comparison: Comparison, out: Path) -> Iterator[tuple[Run, str, list[str], str]]:
    """Each run with its heading, the settings in which it differs from others, and the link to its folder."""
    configured = [run for run in comparison.runs if run.config]
    keys = dict.fromkeys(key for run in configured for key in run.config)
    differing = [key for key in keys if len({run.setting(key) for run in configured}) > 1]
    for run in comparison.runs:
        seed = [] if run.seed is None else [f"seed {run.seed}"]
        value = comparison.quality.of(run)
        figure = "" if value is None else f", {comparison.quality.title} {comparison.quality.text(value)}"
        heading = f"{run.name}: {', '.join([*comparison.settings_of(run).values(), *seed])}: {run.status}{figure}"
        settings = [f"{key} = {run.setting(key)}" for key in differing if run.setting(key) is not None]
        link = Path(os.path.relpath(run.folder.resolve(), out.resolve())).as_posix()
        yield run, heading, settings, link


def _plots(comparison: Comparison, prefix: str) -> list[dict[str, Any]]:
    """file: beside report.md, embedded in the HTML page; table: the plot's numbers, if the main table lacks them."""
    plots = []

    def add(name: str, title: str, caption: str, drawing: Drawing | None, table: Table | None = None) -> None:
        plot = {"title": title, "caption": caption, "drawing": drawing, "table": table}
        plots.extend([plot | {"file": f"{prefix}-{name}.svg"}] if drawing else [])

    if len(comparison.runs) == 1:
        add("course", "Course of the run", _TIME, course(comparison.runs[0], comparison.quality))
    else:
        add("costs", "Quality and cost", _COSTS, tradeoffs(comparison))
        add("learning", "Learning curves", f"{_BAND} {_TIME}", learning_curves(comparison))
        for i, (column, drawing) in enumerate(settings_curves(comparison), 1):
            add(f"setting-{i}", f"By setting: {column}", _BY_SETTING, drawing)
    for i, (title, values) in enumerate(accuracy_by_length(comparison).items(), 1):
        table = lengths_table(comparison, values)
        add(f"length-{i}", f"By length: {title}", _BAND, accuracy_curves(comparison, title, values), table)
    return plots

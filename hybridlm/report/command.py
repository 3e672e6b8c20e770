"""``hybridlm report``."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path

from hybridlm.errors import UserError, printable
from hybridlm.files.durable import replaced
from hybridlm.report.comparison import best_of, compare
from hybridlm.report.page import header, sections_of, to_html, to_text
from hybridlm.report.runs import read_folders
from hybridlm.report.table import runs_table, to_csv
from hybridlm.runs.run_folder import find_run, newest_run


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
    texts = {plot.file: plot.drawing.wide for section in sections for plot in section.plots}
    texts |= {"report.html": to_html(sections, head), "report.md": to_text(sections, head)}
    texts["report.csv"] = to_csv(runs_table(comparisons))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replaced(target / name) as new:
                new.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"{target}: cannot write the report ({error.strerror}); choose a folder with --out") from None
    for section in sections:
        print(printable(f"{section.title}: {' '.join(section.verdict)}"))
        print("".join(f"caution: {printable(caution)}\n" for caution in section.cautions), end="")
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    print(f"\n{printable(str(target / 'report.html'))}, report.md with its plots, and report.csv: {count}")


def _folder(name: str) -> Path:
    if name != "last":
        return Path(name)
    newest = newest_run(Path.cwd())  # it may have no checkpoint yet
    return (find_run(name)[0] if newest is None else newest).path  # find_run says where it looked

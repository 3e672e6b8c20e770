"""What `hybridlm report` does."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path

from hybridlm.errors import UserError, printable
from hybridlm.files.durable import replaced
from hybridlm.report.comparison import Comparison, best_of, compare
from hybridlm.report.page import facts_of, parts_of, to_html, to_text
from hybridlm.report.reading import read_folders
from hybridlm.report.table import runs_table, to_csv
from hybridlm.runs.run_folder import find_run, newest_run


def run_report(names: list[str], out: Path | None, tuned: list[str] | None = None) -> None:
    """Writes report.html, report.md, its plots and report.csv into ``out`` (the first folder) and prints the verdict.

    names: folders, or ``last``, the newest run; tuned: settings of which each point is shown at its best value.

    UserError: a folder is missing, holds no run, ``out`` cannot be written, or a setting of ``tuned`` is not one in
    which runs differ.
    """
    folders = [_folder(name) for name in names]
    runs, sweeps = read_folders(folders)
    target = folders[0] if out is None else out
    words = ["hybridlm", "report", *names, *([] if out is None else ["--out", str(out)])]
    words += [word for key in tuned or [] for word in ("--best-of", key)]
    comparisons = _tuned(compare(runs, [key for sweep in sweeps for key in sweep.varied]), tuned or [])
    facts = facts_of(
        runs, sweeps, shlex.join(words), datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    )
    parts = parts_of(comparisons, target)
    texts = {
        "report.html": to_html(parts, facts),
        "report.md": to_text(parts, facts),
        "report.csv": to_csv(runs_table(comparisons)),
    }
    texts |= {plot.file: plot.drawing.wide for part in parts for plot in part.plots}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replaced(target / name) as new:
                new.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(
            f"{target}: the report cannot be written there ({error.strerror}); name another folder with --out"
        ) from None
    for part in parts:
        print(printable(f"{part.title}: {' '.join(part.verdict)}"))
        print("".join(f"caution: {printable(caution)}\n" for caution in part.cautions), end="")
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    print(f"\n{printable(str(target / 'report.html'))}, report.md with its plots, and report.csv: {count}")


def _folder(name: str) -> Path:
    if name != "last":
        return Path(name)
    newest = newest_run(Path.cwd())  # which may have no checkpoint yet
    return (find_run(name)[0] if newest is None else newest).path  # the former says where a run was looked for


def _tuned(comparisons: list[Comparison], tuned: list[str]) -> list[Comparison]:
    legal = dict.fromkeys(column for comparison in comparisons for column in comparison.columns)
    for key in tuned:
        if key not in legal:
            raise UserError(
                f"report --best-of {key}: not a setting in which these runs differ; those are"
                f" {', '.join(legal) or 'none'}"
            )
    return [best_of(comparison, tuned) for comparison in comparisons]

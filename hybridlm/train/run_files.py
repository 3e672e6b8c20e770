"""metrics.jsonl and metrics.csv of a run folder: each step once, also after a resume and after a disk that was full."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from pydantic import ConfigDict, TypeAdapter

from hybridlm.errors import UserError
from hybridlm.files.durable import replaced
from hybridlm.files.plain import Unreadable, parse_json, read_text
from hybridlm.train.metrics import COLUMNS, Metrics

_MAX_BYTES = 2**28  # 400 thousand logged steps
_ROW = TypeAdapter(dict[str, int | float | list[int | float]], config=ConfigDict(strict=True))


class Rows:
    """An append-only text file of one line per step. A second call for the last step rewrites its line.

    Lines that the disk does not take are kept, and written with the next one.
    """

    def __init__(self, path: Path, encode: Callable[[Metrics], str], head: str) -> None:
        """``encode`` gives a row's line with its end; the file begins with ``head``, whatever it held. OSError: it
        cannot be written."""
        self._path, self._encode = path, encode
        with replaced(path) as new:  # all of an earlier session or nothing of it is lost
            new.write_text(head, encoding="utf-8", newline="\n")
        self._kept = len(head.encode())  # bytes of the file that stay as they are
        self._lines: list[
            bytes
        ] = []  # what belongs behind them: the last line, and those before it that were not written

    def write(self, row: Metrics, *, again: bool) -> None:
        """OSError: the file cannot be written now."""
        line = self._encode(row).encode()
        self._lines[-1 if again else len(self._lines) :] = [line]
        with open(self._path, "r+b") as file:
            file.seek(self._kept)
            file.truncate()  # what a disk that was full has taken of a line
            file.write(b"".join(self._lines))
        self._kept += sum(map(len, self._lines[:-1]))
        self._lines = self._lines[-1:]


def _json_line(row: Metrics) -> str:
    return json.dumps(row) + "\n"


def _csv_line(row: Metrics) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in COLUMNS])
    return text.getvalue()


class RunFiles(Logger):
    """metrics.jsonl and metrics.csv of a run folder. A file that cannot be written is said once, tried again at every
    row, and said again when it has all of them."""

    def __init__(self, jsonl: Path, csv_file: Path, *, resume_step: int | None, say: Callable[[str], None]) -> None:
        """``resume_step``: steps after it are dropped from files of an earlier session; None: a new run. ``say`` prints
        a line.

        OSError: they cannot be written, and are as they were.
        """
        super().__init__()
        self._row: Metrics = {}
        self._say, self._failing = say, set[Path]()
        self.kept = _rows_until(jsonl, resume_step) if resume_step is not None else []  # rows of earlier sessions
        self._files = {
            jsonl: Rows(jsonl, _json_line, "".join(map(_json_line, self.kept))),
            csv_file: Rows(csv_file, _csv_line, ",".join(COLUMNS) + "\n" + "".join(map(_csv_line, self.kept))),
        }

    @rank_zero_only
    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:  # type: ignore[override]
        again = self._row.get("step") == step
        self._row = {**(self._row if again else {"step": step or 0}), **metrics}
        for path, file in self._files.items():
            try:
                file.write(self._row, again=again)
            except OSError as error:
                if path not in self._failing:
                    self._failing.add(path)
                    self._say(
                        f"warning     {path}: cannot be written ({error.strerror or error}); its rows are kept,"
                        " training goes on"
                    )
            else:
                if path in self._failing:
                    self._failing.discard(path)
                    self._say(f"metrics     {path} can be written again and has every row")

    def log_hyperparams(self, params: Any = None) -> None:
        """The configuration is in config.yaml."""

    @property
    def name(self) -> str:
        return "files"

    @property
    def version(self) -> str:
        return ""


def _rows_until(jsonl: Path, step: int) -> list[Metrics]:
    """The rows up to ``step``; a line that is none, such as one cut short by a crash, ends them. UserError: the file
    cannot be read."""
    rows: list[Metrics] = []
    if not jsonl.exists():
        return rows
    try:
        lines = read_text(jsonl, _MAX_BYTES).splitlines()
    except Unreadable as error:
        raise UserError(f"{jsonl}: {error}; move it away to go on without the rows of earlier sessions") from None
    for line in lines:
        try:
            row = _ROW.validate_python(parse_json(line))
        except ValueError:  # of both
            break
        if not isinstance(row.get("step"), int) or row["step"] > step:  # type: ignore[operator]
            break
        rows.append(row)
    return rows

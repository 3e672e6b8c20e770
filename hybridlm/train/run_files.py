"""Text files of a run folder: metrics.jsonl and metrics.csv, which have every step once, also after a resume or a full
disk, and files that a run can do without."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from pydantic import ConfigDict, TypeAdapter

from hybridlm.errors import UserError
from hybridlm.files.durable import replaced
from hybridlm.files.plain import Unreadable, parse_json, read_text
from hybridlm.train.metrics import COLUMNS

Row = Mapping[str, int | float | list[int | float] | list[float]]
_MAX_BYTES = 2**28  # 400 thousand logged steps
_ROW = TypeAdapter(dict[str, int | float | list[int | float]], config=ConfigDict(strict=True))


class LineFile:
    """An append-only text file with a line per step. A second call for the last step rewrites its line.

    Lines that cannot be written are kept, and written with the next one.
    """

    def __init__(self, path: Path, encode: Callable[[Row], str], head: str) -> None:
        """``encode`` gives a row's line with its end; the file is replaced by ``head``. OSError: it cannot be
        written."""
        self._path, self._encode = path, encode
        with replaced(path) as new:  # an earlier session's rows stay whole
            new.write_text(head, encoding="utf-8", newline="\n")
        self._kept = len(head.encode())  # bytes of the file that are final
        self._lines: list[bytes] = []  # what follows them: the last line, and those before it that were not written

    def write(self, row: Row, *, again: bool) -> None:
        """OSError: the file cannot be written now."""
        self._lines[-1 if again else len(self._lines) :] = [self._encode(row).encode()]
        with open(self._path, "r+b") as file:
            file.seek(self._kept)
            file.truncate()  # part of a line that a full disk took
            file.write(b"".join(self._lines))
        self._kept += sum(map(len, self._lines[:-1]))
        self._lines = self._lines[-1:]


def _json_line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _csv_line(row: Row) -> str:
    return ",".join(str(row.get(name, "")) for name in COLUMNS) + "\n"  # numbers only


class RowLogger(Logger):
    """A logger of rows of metrics. The configuration is in config.yaml, so none of them logs it."""

    name = "hybridlm"
    version = ""

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing."""


class RunFiles(RowLogger):
    """metrics.jsonl and metrics.csv of a run folder. A file that cannot be written is reported, and tried again at
    every row."""

    def __init__(self, jsonl: Path, csv_file: Path, *, resume_step: int | None, say: Callable[[str], None]) -> None:
        """``resume_step``: later steps are dropped from the files of an earlier session; None: a new run. ``say``
        prints a line.

        OSError: they cannot be written, and are unchanged.
        """
        super().__init__()
        self._row: Row = {}
        self._say, self._failing = say, set[Path]()
        self.kept = _rows_until(jsonl, resume_step) if resume_step is not None else []  # rows of earlier sessions
        self._files = {
            jsonl: LineFile(jsonl, _json_line, "".join(map(_json_line, self.kept))),
            csv_file: LineFile(csv_file, _csv_line, ",".join(COLUMNS) + "\n" + "".join(map(_csv_line, self.kept))),
        }

    @rank_zero_only
    def log_metrics(self, metrics: Row, step: int | None = None) -> None:
        again = self._row.get("step") == step
        self._row = {**(self._row if again else {"step": step or 0}), **metrics}
        for path, file in self._files.items():
            try:
                file.write(self._row, again=again)
                self._failing.discard(path)
            except OSError as error:
                if path not in self._failing:
                    self._say(
                        f"warning     {path}: cannot be written ({error.strerror or error}); its rows are kept,"
                        " training continues"
                    )
                self._failing.add(path)


def _rows_until(jsonl: Path, step: int) -> list[Row]:
    """The rows up to ``step``. Reading ends at the first invalid line, such as one cut short by a crash.
    UserError: it cannot be read."""
    rows: list[Row] = []
    try:
        lines = read_text(jsonl, _MAX_BYTES).splitlines() if jsonl.exists() else []
    except Unreadable as error:
        raise UserError(f"{jsonl}: {error}; move it away to resume without the rows of earlier sessions") from None
    with suppress(ValueError):  # of both readers
        for line in lines:
            row = _ROW.validate_python(parse_json(line))
            if not isinstance(at := row.get("step"), int) or at > step:
                break
            rows.append(row)
    return rows


def write_or_warn(path: Path, text: str, say: Callable[[str], None]) -> None:
    """Writes ``text``, creating its folder. A failure is reported to ``say`` in one line and does not end the run."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replaced(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        say(f"warning     {path}: cannot be written ({error.strerror or error})")

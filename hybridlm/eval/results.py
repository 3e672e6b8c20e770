"""eval.json of a run folder: every evaluation of the run, one record each (docs/evaluation.md)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from hybridlm.config.problems import recorded
from hybridlm.config.section import Section
from hybridlm.errors import UserError
from hybridlm.files.durable import replaced
from hybridlm.files.plain import Unreadable, read_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One evaluation. what: ``loss``, ``task/NAME`` or ``probe/NAME``; settings: all that its numbers depend on beside
    the weights; metrics: flat, by name; curve: rows of numbers by name, where the evaluation has them; when: UTC, ISO
    8601."""

    what: str
    checkpoint: str  # file name
    step: int
    ema: bool
    settings: dict[str, Any]
    metrics: dict[str, float]
    curve: list[dict[str, float]] = field(default_factory=list)
    when: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    @property
    def key(self) -> str:
        """Two records of one key are the same measurement; the later one takes the place of the earlier."""
        return json.dumps([self.what, self.checkpoint, self.step, self.ema, self.settings], sort_keys=True)


class RecordFacts(Section):
    """A ``Record`` in the file."""

    model_config = ConfigDict(allow_inf_nan=True)

    what: str
    checkpoint: str
    step: int = Field(ge=0)
    ema: bool
    settings: dict[str, object]
    metrics: dict[str, float]
    curve: list[dict[str, float]] = []
    when: str


class EvalFacts(Section):
    format_version: Literal[1]
    results: list[RecordFacts]


def read_records(path: Path) -> list[Record]:
    """What ``add_records`` wrote, none if there is no file. UserError: the file is not one of ours."""
    if not path.exists():
        return []
    try:
        content = read_json(path)
    except Unreadable as error:
        raise UserError(f"{path}: {error}; move it away") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; move it away")
    return [Record(**record.model_dump()) for record in recorded(EvalFacts, content, path).results]


def add_records(path: Path, new: Sequence[Record]) -> None:
    """Adds to the file; a record of the same key is replaced. UserError: see ``read_records``, or it cannot be
    written."""
    merged = {record.key: asdict(record) for record in read_records(path)}
    for record in new:
        merged.pop(record.key, None)  # the newest stand last
        merged[record.key] = asdict(record)
    text = json.dumps({"format_version": FORMAT_VERSION, "results": list(merged.values())}, indent=1)
    try:
        with replaced(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None

"""Parses the files of a run folder, whoever wrote them. A file that a killed process left half-written is read as far
as it goes; content that no version of hybridlm writes raises BadRun."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hybridlm.config.section import Section
from hybridlm.errors import printable
from hybridlm.files.plain import MAX_BYTES, Malformed, Unreadable, open_regular, parse_json, parse_yaml, read_text

JsonObject = Mapping[str, object]
_METRICS_BYTES = 2**27  # 200 thousand logged steps
_TEXT_BYTES = 2**20
_LARGEST = 1e30  # larger values are not measurements
_METRICS = TypeAdapter[Any](dict[str, float | list[float] | None], config=ConfigDict(strict=True))
R = TypeVar("R", bound=Section)
_SUMMARY = TypeAdapter[Any](dict[str, bool | float | str | None], config=ConfigDict(strict=True))


class BadRun(ValueError):
    """A run folder cannot be read: which file, and why."""


class JobRecord(Section):
    """What a report reads of job.json."""

    model_config = ConfigDict(extra="ignore")

    status: str = ""
    error: str | None = None
    overrides: list[str] = []
    seconds: Annotated[float, Field(ge=0, lt=_LARGEST)] | None = None
    seed: int | None = None


class SweepRecord(Section):
    """What a report reads of sweep.json. varied: the fields that differ between its jobs."""

    model_config = ConfigDict(extra="ignore")

    varied: list[str] = []
    command: str = ""


def number(value: object) -> float | None:
    """``value`` as a float, infinite if it is too large to be a measurement; None if it is not a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if not abs(value) >= _LARGEST else math.copysign(math.inf, value)


def parsed_number(text: str) -> float | None:
    """The finite number that ``text`` spells, or None."""
    try:
        value = number(float(text))
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None


def read_record(path: Path, kind: type[R]) -> R | None:
    """job.json or sweep.json; None if it does not exist or was cut short."""
    content = read_object(path)
    with _readable(path.name):
        return kind.model_validate(content) if content else None


def read_summary(path: Path) -> JsonObject:
    """Strings and numbers."""
    with _readable(path.name):
        return _SUMMARY.validate_python(read_object(path))


def read_object(path: Path) -> JsonObject:
    """The object in a JSON file; empty if there is none, or the file was cut short."""
    with _readable(path.name), suppress(Malformed):
        content = parse_json(_text(path))
        return content if isinstance(content, dict) else {}
    return {}


def read_mapping(path: Path) -> JsonObject:
    """The mapping in a YAML file; empty if there is none."""
    with _readable(path.name):
        content = parse_yaml(_text(path))
    return content if isinstance(content, dict) else {}


def read_metrics(path: Path) -> tuple[JsonObject, ...]:
    """The rows of metrics.jsonl by ascending step. A line that a crash cut short is left out."""
    rows: dict[int, JsonObject] = {}
    with _readable(path.name):
        lines = _text(path, _METRICS_BYTES).splitlines()
    for line_number, line in enumerate(lines, 1):
        with _readable(f"{path.name}, line {line_number}"), suppress(Malformed):
            row = parse_json(line)
            step = row.get("step") if isinstance(row, dict) else None
            if isinstance(step, int) and 0 <= step < 2**53:
                rows[step] = _METRICS.validate_python(row)
    return tuple(rows[step] for step in sorted(rows))


def read_excerpt(path: Path, *, end: bool = False) -> str:
    """The first megabyte of a text file (``end``: the last one); empty if there is no file."""
    if not path.exists():
        return ""
    with _readable(path.name), open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TEXT_BYTES) if end else 0)
        return file.read(_TEXT_BYTES).decode("utf-8", "replace")


def _text(path: Path, limit: int = MAX_BYTES) -> str:
    return read_text(path, limit) if path.exists() else ""


@contextmanager
def _readable(place: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise BadRun(f"{place}: {error}") from None
    except ValidationError as error:
        field = printable(str(error.errors()[0]["loc"][0]))[:80]
        raise BadRun(f"{place}: {field}: {error.errors()[0]['msg']}") from None

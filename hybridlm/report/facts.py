"""The files of a run folder as values that can be relied on, whoever wrote them. What a killed process left
half-written is read as far as it goes; what no version of ours writes makes the folder a bad run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hybridlm.config.problems import recorded
from hybridlm.config.section import Section
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import Malformed, Unreadable, open_regular, parse_json, parse_yaml, read_text

Facts = Mapping[str, object]
_METRICS_BYTES = 2**27  # 200 thousand logged steps
_WORDS_BYTES = 2**20
_LARGEST = 1e30  # of a number that is measured or set; what is larger is none
_LINE = TypeAdapter(dict[str, float | list[float] | None], config=ConfigDict(strict=True))
_SCALARS = TypeAdapter(dict[str, bool | float | str | None], config=ConfigDict(strict=True))


class BadRun(ValueError):
    """What is wrong with a run folder: which file, and why."""


class JobFacts(Section):
    """Of job.json what a report reads."""

    model_config = ConfigDict(extra="ignore")

    status: str = ""
    error: str | None = None
    overrides: list[str] = []
    seconds: Annotated[float, Field(ge=0, lt=_LARGEST)] | None = None
    seed: int | None = None


class SweepFacts(Section):
    """Of sweep.json what a report reads."""

    model_config = ConfigDict(extra="ignore")

    varied: list[str] = []
    command: list[str] | str = ""


def number(value: object) -> float | None:
    """A number, also one that is not finite, or is too large to be one; None for all else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if not abs(value) >= _LARGEST else math.copysign(math.inf, value)


def written_number(text: str) -> float | None:
    """The finite number that a text is; None where it is none."""
    try:
        value = number(float(text))
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None


def job(path: Path) -> Facts:
    return _checked(path, JobFacts)


def sweep(path: Path) -> Facts:
    return _checked(path, SweepFacts)


def evaluation(path: Path) -> Facts:
    """Of which a report takes what it knows, number by number."""
    return _json(path)


def _checked(path: Path, kind: type[Section]) -> Facts:
    facts = _json(path)
    if facts:
        try:
            recorded(kind, facts, path.name)
        except UserError as error:
            raise BadRun(error.problems[0]) from None
    return facts


def summary(path: Path) -> Facts:
    """Texts and numbers; raises BadRun where one is so large that it is none."""
    facts = _json(path)
    _validated(path, _SCALARS, facts)
    for key, value in facts.items():
        if (found := number(value)) is not None and math.isinf(found) and not math.isinf(value):  # type: ignore[arg-type]
            raise BadRun(f"{path.name}: {printable(key)[:80]} = {value:.3g}: too large")
    return facts


def mapping(path: Path) -> Facts:
    """What a YAML file maps; empty where there is none, or it maps nothing."""
    text = _text(path)
    try:
        content = parse_yaml(text)
    except Unreadable as error:
        raise BadRun(f"{path.name}: {error}") from None
    return content if isinstance(content, dict) else {}


def rows(path: Path) -> tuple[Facts, ...]:
    """Of metrics.jsonl, by rising step. A line that a crash cut short is left out."""
    found: dict[int, Facts] = {}
    for place, line in enumerate(_text(path, _METRICS_BYTES).splitlines(), 1):
        try:
            row = parse_json(line)
        except Malformed:
            continue
        except Unreadable as error:
            raise BadRun(f"{path.name}, line {place}: {error}") from None
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(row, dict) and isinstance(step, int) and 0 <= step < 2**53:
            _validated(path, _LINE, row, f", line {place}")
            found[step] = row
    return tuple(found[step] for step in sorted(found))


def words(path: Path, *, end: bool = False) -> str:
    """The first megabyte of a text, or the last; empty where there is none."""
    if not path.exists():
        return ""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _WORDS_BYTES) if end else 0)
            return file.read(_WORDS_BYTES).decode("utf-8", "replace")
    except Unreadable as error:
        raise BadRun(f"{path.name}: {error}") from None


def _json(path: Path) -> Facts:
    """Empty where there is none, or it was cut short."""
    text = _text(path)
    if not text:
        return {}
    try:
        content = parse_json(text)
    except Malformed:
        return {}
    except Unreadable as error:
        raise BadRun(f"{path.name}: {error}") from None
    return content if isinstance(content, dict) else {}


def _text(path: Path, limit: int | None = None) -> str:
    if not path.exists():
        return ""
    try:
        return read_text(path) if limit is None else read_text(path, limit)
    except Unreadable as error:
        raise BadRun(f"{path.name}: {error}") from None


def _validated(path: Path, kind: TypeAdapter[dict[str, object]], value: Facts, place: str = "") -> None:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        where = printable(".".join(map(str, error.errors()[0]["loc"][:1])))[:80]
        raise BadRun(f"{path.name}{place}: {where} is neither text nor a number") from None

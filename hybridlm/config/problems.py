"""Validation of a section, with one clear line per problem: the field, its value, what is expected."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hybridlm.config.foreign_names import foreign
from hybridlm.config.section import Section
from hybridlm.errors import ConfigError, UserError, printable

S = TypeVar("S", bound=Section)
_NAMES: dict[object, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_PLURALS = {"a number": "numbers", "text": "texts", "an integer": "integers"}
# Constraints of pydantic's, in words.
_LIMITS = {
    "ge": ">= {}",
    "gt": "> {}",
    "le": "<= {}",
    "lt": "< {}",
    "min_length": "of length >= {}",
    "max_length": "of length <= {}",
    "pattern": "matching {}",
}


def validate(cls: type[S], tree: Mapping[str, object], where: str = "") -> S:
    """``tree`` as a ``cls``; ``where`` is the dotted path of the section in the whole configuration.

    Raises:
        ConfigError: one line per field that is unknown, of a wrong type, or out of range; one for each ``???``.
    """
    missing = [dotted(where, gap) for gap in sorted(_missing(tree))]
    problems = {path: f"{path} = ???: a value is required" for path in missing}
    try:
        section = cls.model_validate(tree)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            path, line = _problem(cls, detail["loc"], tree, where)
            problems.setdefault(path, line)
    if problems:
        raise ConfigError(list(problems.values()))
    return section


def recorded(cls: type[S], tree: object, where: object) -> S:
    """``tree``, from a file of ours, as a ``cls``. where: starts the line. UserError: the first problem."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: expected a mapping")
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
    raise UserError(f"{where}: {_problem(cls, details[0]['loc'], tree, '')[1]}")


def broken(*rules: tuple[object, str]) -> list[str]:
    """The lines of the broken ones among rules between fields: a rule is what must not hold, and the line about it."""
    return [line for wrong, line in rules if wrong]


def _missing(tree: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if tree == "???":
        yield path
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _missing(value, (*path, str(key)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _missing(value, (*path, str(index)))


def dotted(where: str, path: Sequence[str]) -> str:
    """The dotted path of a field in the whole configuration; unprintable keys are quoted."""
    return ".".join([*([where] if where else []), *(name if name.isprintable() else repr(name) for name in path)])


def _problem(cls: type[Section], loc: tuple[int | str, ...], tree: Mapping[str, object], where: str) -> tuple[str, str]:
    """The dotted path of the field of pydantic's ``loc``, and the line about it.

    After the field, ``loc`` names members of unions and indices of lists, so that one mistake may occur several times.
    """
    section, names = cls, list[str]()
    expected = "expected a section of fields"
    for part in loc:
        names.append(str(part))
        info = next((field for name, field in section.model_fields.items() if part in (name, field.alias)), None)
        if info is None:
            return dotted(where, names), _unknown(cls, section, names, tree, where)
        inner = section_type(info.annotation)
        if inner is None:
            expected = _expected(info)
            break
        section = inner
    path = dotted(where, names)
    return path, f"{path or 'the configuration'} = {show(_at(tree, names))}: {expected}"


def section_type(annotation: object) -> type[Section] | None:
    """The section that a field is; None: it is a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _at(tree: object, names: Sequence[str]) -> object:
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def show(value: object) -> str:
    """A value as the user would write it, shortened to a line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        text = f"[{', '.join(show(item) for item in value)}]"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{dotted('', [str(key)])}: {show(item)}" for key, item in value.items()) + "}"
    else:
        text = printable(repr(value))  # the repr of a tensor has several lines
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown(
    root: type[Section], section: type[Section], names: list[str], tree: Mapping[str, object], where: str
) -> str:
    value, path = _at(tree, names), dotted(where, names)
    if not isinstance(value, Mapping):
        return f"{path} = {show(value)}: unknown key; {_meant(root, section, names, where)}"
    # At the top it may be a section of another program's configuration.
    known = [said for key in value if len(names) == 1 and (said := foreign(f"{names[0]}.{key}")) is not None]
    return f"{path}: unknown key; {'; '.join(known) or _meant(root, section, names, where)}"


def _meant(root: type[Section], section: type[Section], names: list[str], where: str) -> str:
    """A hint at an unknown key: a similar field of ours, or what a setting of another program is called here."""
    known, parent, key = list(section.model_fields), dotted(where, names[:-1]), dotted(where, names)
    said = foreign(key)
    if not parent and said is not None:
        return said
    likely = [dotted(where, path) for path in _fields(root) if path[-1] == names[-1]][:3] or [
        dotted(where, [*names[:-1], name]) for name in difflib.get_close_matches(names[-1], known, n=1)
    ]
    if likely:
        return f"did you mean {' or '.join(likely)}?"
    return said or f"{parent or 'the configuration'} has {', '.join(known)}"


def field_named(root: type[Section], name: str) -> str | None:
    """The field that a word means, or a hint; None: nothing is similar."""
    plain = name.replace("-", "_")
    fields = [".".join(path) for path in _fields(root)]
    if plain in fields:
        return plain
    same = [field for field in fields if field.rpartition(".")[2] == plain]
    return foreign(plain) or (f"did you mean {' or '.join(same[:3])}?" if same else None)


def _fields(section: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, info in section.model_fields.items():
        yield (*path, name)
        if inner := section_type(info.annotation):
            yield from _fields(inner, (*path, name))


def _expected(info: FieldInfo) -> str:
    if get_origin(info.annotation) is Literal:
        return f"not one of {', '.join(str(choice) for choice in get_args(info.annotation))}"
    return f"expected {_describe(info.annotation, info.metadata)}"


def _describe(annotation: object, metadata: Sequence[object] = ()) -> str:
    """The values of a type, in words: ``an integer >= 1 or 'auto'``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        members = [_describe(member, () if member is type(None) else metadata) for member in arguments]
        return f"{', '.join(members[:-1])} or {members[-1]}"
    if origin is Literal:
        return " or ".join(show(choice) for choice in arguments)
    if origin in (tuple, list):
        inner = _describe(arguments[0])
        items = next((inner.replace(one, many, 1) for one, many in _PLURALS.items() if inner.startswith(one)), inner)
        count = f"{len(arguments)} " if origin is tuple and arguments[-1] is not Ellipsis else ""
        return f"a list of {count}{items}"
    if origin is dict:
        inner = _describe(arguments[1])
        return "a mapping" if inner == "a value" else f"a mapping to {inner.removeprefix('a ')}s"
    return f"{_NAMES.get(annotation, 'a value')} {' and '.join(_limits(metadata))}".strip()


def _limits(metadata: Sequence[object]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _limits(item.metadata)
        for name, words in _LIMITS.items():
            if (limit := getattr(item, name, None)) is not None:
                yield words.format(int(limit) if isinstance(limit, float) and limit.is_integer() else limit)

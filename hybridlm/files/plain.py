"""Untrusted JSON and YAML files, read as plain values: mappings, lists, strings, numbers, true, false, null.

Size, depth and digits are limited; YAML aliases (a few lines of them expand to gigabytes), tags and dates are not
supported. Reading takes time and memory in proportion to the size of the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import yaml

MAX_BYTES = 2**24  # per file; a tokenizer.json of 256k tokens has about 16 MB and a limit of its own
MAX_DEPTH = 64  # nested mappings and lists
MAX_DIGITS = 300  # of an integer, so that it converts to a float
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, if PyYAML was built with it


class Unreadable(ValueError):
    """Why a file or a text cannot be read, in a few words, without its name."""


class Malformed(Unreadable):
    """It is not valid JSON or YAML, for instance because it was truncated."""


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened for reading; not a pipe, which might block, nor a device, which might never end. Raises
    Unreadable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Unreadable("not a regular file")
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise Unreadable(str(error)) from None  # Unreadable itself, or an impossible file name
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text of a regular file of at most ``limit`` bytes. Raises Unreadable."""
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    if len(content) > limit:
        raise Unreadable(f"larger than {limit:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text (byte {error.start:,})") from None


def read_json(path: Path, limit: int = MAX_BYTES, *, unique: bool = False) -> object:
    """The plain value in a JSON file. unique: a key that an object has twice is refused. Raises Unreadable."""
    return parse_json(read_text(path, limit), unique=unique)


def read_yaml(path: Path, limit: int = MAX_BYTES) -> object:
    """The plain value in a YAML file. Raises Unreadable."""
    return parse_yaml(read_text(path, limit))


def parse_json(text: str | bytes, *, unique: bool = False) -> object:
    """The plain value of a JSON text. unique: as in ``read_json``. Raises Unreadable."""
    try:
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise Unreadable(f"more than {MAX_DEPTH} levels deep") from None
    except Unreadable:
        raise
    except ValueError as error:  # UnicodeDecodeError too
        raise Malformed(f"not JSON ({_short(error)})") from None
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise Unreadable(f"more than {MAX_DEPTH} levels deep")


def parse_yaml(text: str) -> object:
    """The plain value of a YAML text. Raises Unreadable."""
    try:
        _refuse_structure(text)
        return yaml.load(text, Loader=_PlainLoader)
    except Unreadable:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Malformed(f"not YAML ({_short(error)})") from None


def _refuse_structure(text: str) -> None:
    """Checks the events of the parser, before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=_Parser):
        if isinstance(event, yaml.AliasEvent):
            raise Unreadable("has an alias (*name); write the value out")
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise Unreadable(f"has a tag ({tag}); plain values only")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise Unreadable(f"more than {MAX_DEPTH} levels deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which programs read one or the other where a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unreadable(f"has {Counter(key for key, _ in pairs).most_common(1)[0][0][:60]!a} twice")
    return found


def _whole(digits: str) -> int:
    """A decimal integer of JSON."""
    _refuse_long(digits)
    return int(digits)


def _refuse_long(digits: str) -> None:
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"an integer of more than {MAX_DIGITS} digits")


class _PlainLoader(_Parser):
    """Dates stay strings, and integers have limited digits."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in _Parser.yaml_implicit_resolvers.items()
    }

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        _refuse_long(node.value)  # hexadecimal and sexagesimal numbers have no other limit
        return int(self.construct_yaml_int(node))


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_whole)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__

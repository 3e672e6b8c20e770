"""Preparation of the command line for Hydra, as text only.

Hydra stops at the first unknown key and cannot parse ``model.pattern=(TM)*6``. Plain ``a.b=c`` becomes ``++a.b=c``, so
that all mistakes reach our validation and are reported together; patterns and paths are quoted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from hybridlm.errors import ConfigError, UserError

_FLAGS_WITH_VALUE = (
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p"),
    *("--cfg", "-c", "--info", "-i"),  # not --experimental-rerun, which reads a pickle
)
HYDRA_FLAGS = (
    *_FLAGS_WITH_VALUE,
    *(
        "--help",
        "-h",
        "--hydra-help",
        "--version",
        "--resolve",
        "--run",
        "-r",
        "--multirun",
        "-m",
        "--shell-completion",
        "-sc",
    ),
)
_LONGEST = 200_000  # characters of an override; Hydra's parser takes seconds for more
_DEEPEST = 40  # nested brackets, each of which is a recursive call of the parser
_SWEEPS = ("choice(", "glob(", "shuffle(")
_INFO_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~|)(?P<key>[^=+~][^=]*)(?:=(?P<value>.*))?", re.DOTALL)
_PATHS = ("data.path", "data.val_path", "data.out", "data.tokenizer.path", "data.hf.id", "ckpt", "init_from")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_SEVERAL = re.compile(
    r"(?:Ambiguous value for argument|Sweep parameters) '\+*([^=]*)=(.*?)'(?: 1\. To use| requires)"
)  # Hydra's words


@dataclass(frozen=True)
class CommandLine:
    """Hydra's flags with their values, and the overrides."""

    flags: tuple[str, ...]
    overrides: tuple[str, ...]

    def value(self, *names: str) -> str | None:
        """The value of the flag of one of these names, after a space or ``=``, the last time it is given."""
        found = None
        for flag, following in zip(self.flags, [*self.flags[1:], ""], strict=False):
            name, equals, attached = flag.partition("=")
            if name in names:
                found = attached if equals else following
        return found

    def has(self, *names: str) -> bool:
        return any(flag.partition("=")[0] in names for flag in self.flags)

    @property
    def multirun(self) -> bool:
        return self.has("-m", "--multirun") or any(
            re.fullmatch(r"\+*hydra\.mode=multirun", line, re.IGNORECASE) for line in self.overrides
        )


def split(argv: Sequence[str]) -> CommandLine:
    """Separates flags and overrides: Hydra's parser rejects overrides on both sides of a flag."""
    flags: list[str] = []
    overrides: list[str] = []
    pending = ""
    for token in argv:
        takes = token in _INFO_TOPICS if pending in ("--info", "-i") else bool(pending)
        flag = takes or (token.startswith("-") and not token.startswith("-="))
        (flags if flag else overrides).append(token)
        pending = token if flag and not takes and token in _FLAGS_WITH_VALUE else ""
    return CommandLine(tuple(flags), tuple(overrides))


def refuse_flags(argv: Sequence[str], known: Collection[str], legal: str) -> None:
    """UserError: options (words with leading dashes) that are not among ``known``, each with the field it may mean.
    legal: what is known, in words."""
    from hybridlm.config.problems import field_named
    from hybridlm.config.run import RunConfig

    problems = []
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if not re.match(r"--?[A-Za-z]", word) or flag in known:
            continue
        bare = following if not equals and following and not following.startswith("-") and "=" not in following else ""
        shown, name = f"{word} {bare}".strip(), flag.lstrip("-")
        meant = field_named(RunConfig, name)
        if meant is None:
            problems.append(f"unknown option {shown}; legal: {legal}")
            continue
        exact = meant == name.replace("-", "_")
        hint = f": {meant}={value or bare or '...'}" if exact else f"; {meant}"
        problems.append(f"{shown}: a field is set without dashes{hint}")
    if problems:
        raise UserError(problems)


def several_values(said: str) -> str | None:
    """The line about an override that Hydra takes for a sweep when a single configuration is composed; None: the
    message ``said`` is about something else."""
    found = _SEVERAL.match(said)
    if found is None:
        return None
    key, values = found[1], found[2].replace('"', "")
    remedy = "`hybridlm sweep` trains each and `hybridlm sweep --dry-run` plans each"
    a_list = f" (a list is {key}=[a,b])" if "." in key else ""
    return f"{key}={values}: several values, but this takes one; {remedy}{a_list}"


def key_of(override: str) -> str:
    """The field or group that an override sets: ``++a.b=c`` gives ``a.b``."""
    match = _OVERRIDE.fullmatch(override)
    return match["key"].strip() if match else override


def value_of(overrides: Sequence[str], key: str) -> str | None:
    """The last value of ``key``, unquoted, or None."""
    values = [override.partition("=")[2] for override in overrides if key_of(override) == key]
    return _unquoted(values[-1]) if values else None


def typed(override: str) -> str:
    """A repaired override as a user types it: without signs, and without quotes that ``repair`` would add again."""
    key, _, value = override.lstrip("+").partition("=")
    bare = _unquoted(value)
    return f"{key}={bare if _repaired(key, bare, (), several=False) == f'++{key}={value}' else value}"


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
        return value
    return re.sub(rf"(\\+)(?={value[0]}|$)", lambda found: found[1][: len(found[1]) // 2], value[1:-1])


def repair(overrides: Sequence[str], groups: Collection[str], *, several: bool = False) -> list[str]:
    """``overrides`` as Hydra and our validation need them. groups: names of the config groups; several: a comma in a
    path separates points of a sweep.

    Raises:
        UserError: something is not an override.
    """
    repaired, wrong = [], []
    for line in overrides:
        match = _OVERRIDE.fullmatch(line)
        if match is None or (match["value"] is None and match["sign"] != "~"):
            wrong.append(f"{line!r}: {_expected(line)}")
        elif match["sign"] == "~" or re.match(r"hydra[./=]", match["key"] + "="):
            repaired.append(line)
        else:
            repaired.append(_repaired(match["key"].strip(), match["value"], groups, several))
    if wrong:
        raise UserError(wrong)
    return repaired


def _expected(word: str) -> str:
    if word.endswith((".py", ".yaml", ".yml", ".json")):
        return (
            "a file of settings is an experiment: experiments=NAME for experiments/NAME.yaml (--config-dir for"
            " another folder)"
        )
    return "expected field=value (trainer.max_steps=100) or group=option (model=transformer)"


def _repaired(key: str, value: str, groups: Collection[str], several: bool) -> str:
    if key == "kernels" and not value.lstrip().startswith("{"):  # kernels=cuda is written like a group
        key = "kernels.default"
    if is_group(key, groups):
        # A group of the defaults list is chosen without a sign; adding it is the same choice.
        return f"{key}={value}"
    if key in _PATHS:
        value = _quoted_path(value, several)
    return f"++{key}={quoted_pattern(value) if key == 'model.pattern' else value}"


def _quoted_path(value: str, several: bool) -> str:
    """A path, or a list of paths in brackets, quoted so that Hydra's grammar accepts every character. What exists is
    one path; in a sweep a comma outside of brackets and braces separates two."""
    if value in ("", "null", "???"):
        return value
    if os.path.exists(value):
        return quoted(value)
    if _QUOTED.fullmatch(value) or (several and value.startswith(_SWEEPS)):
        return value
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_quoted_path(piece.strip(), False) for piece in pieces(value[1:-1]))}]"
    parts = list(pieces(value)) if several else [value]
    return ",".join(quoted(part) if part == value else _quoted_path(part, False) for part in parts)


def quoted(value: str | Path) -> str:
    """A text or a path as a value of Hydra's grammar, whatever characters it has."""
    text = value.as_posix() if isinstance(value, Path) else value
    # A backslash is an escape only before a quote, or before another one that stands before it.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def quoted_pattern(value: str) -> str:
    """A pattern, or comma-separated patterns of a sweep, quoted so that Hydra's grammar accepts every character."""
    quoted_pieces = []
    for piece in map(str.strip, pieces(value)):
        if piece.startswith("[") and piece.endswith("]"):
            piece = f"[{quoted_pattern(piece[1:-1])}]"
        elif piece not in ("", "null", "???") and not piece.startswith(("'", "${", *_SWEEPS)) and '"' not in piece:
            piece = piece if "\\" in piece else f'"{piece}"'
        quoted_pieces.append(piece)
    return ",".join(quoted_pieces)


def pieces(value: str) -> Iterator[str]:
    """``value``, such as several patterns, split at commas outside of quotes, brackets and parentheses."""
    depth, quote, start = 0, "", 0
    for index, letter in enumerate(value):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth = max(0, depth - 1)
        elif letter == "," and not depth:
            yield value[start:index]
            start = index + 1
    yield value[start:]


def merged(recorded: Sequence[str], new: Sequence[str]) -> list[str]:
    """The overrides of a run followed by new ones, which replace those of the same field or group."""
    replaced = {key_of(line) for line in new}
    return [line for line in recorded if key_of(line) not in replaced] + list(new)


def refuse_odd(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """ConfigError: an override for which Hydra's parser has no clear message, or which it takes very long to parse.
    groups: options by group."""
    for override in overrides:
        shown = override.lstrip("+")[:60]
        if len(override) > _LONGEST:
            raise ConfigError(f"{shown}...: longer than {_LONGEST:,} characters")
        brackets = re.findall(r"[\[\](){}]", override)
        if max(accumulate((1 if one in "[({" else -1 for one in brackets), _depth, initial=0)) > _DEEPEST:
            raise ConfigError(f"{shown}...: brackets more than {_DEEPEST} deep")
        key, equals, value = override.partition("=")
        name = key.lstrip("+~")
        if name in groups and equals and value.strip()[:1] in ("[", "{"):
            raise ConfigError(f"{name}={value[:60]}: expected one option; available: {', '.join(groups[name])}")


def _depth(depth: int, change: int) -> int:
    return max(0, depth + change)


def is_group(override: str, groups: Collection[str]) -> bool:
    """Whether an override chooses, or removes, an option of a config group."""
    key = key_of(override)
    return key in groups or "/" in key or "@" in key

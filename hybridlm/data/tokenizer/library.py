"""The ``tokenizers`` library, called on untrusted files.

They are JSON and run no code, but the library fails on some in its own way: a Rust panic, which ``except Exception``
does not catch and whose report goes to file descriptor 2, and tables as long as the largest id. So sizes are checked
before the library is called.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.config.problems import recorded
from hybridlm.config.section import Section
from hybridlm.data.tokenizer.byte_strings import check_largest
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import Unreadable, read_json

LEGAL = "a byte-level BPE, or a SentencePiece BPE or Unigram with byte fallback: a tokenizer.json, or a folder with one"
MAX_BYTES = 2**26  # of a file; a tokenizer.json of 256k tokens takes 33 MB
_MAX_ADDED = 2**16  # tokens besides the model's; each is checked by itself
_REASON = 200  # characters of the library's own message
_PROBES = "a 1!\n\tA_é☃"  # and the letters of the regexes
_PROBE_LENGTH = 64  # for a regex with catastrophic backtracking 2 ** 64 steps are too many
_Id = Annotated[int, Field(ge=0)]


class _Facts(Section):
    model_config = ConfigDict(extra="ignore")


class _Added(_Facts):
    id: _Id
    content: str


class _Model(_Facts):
    vocab: dict[str, _Id] | list[list[str | float]]
    merges: list[str | list[str]] = []


class TokenizerFacts(_Facts):
    """The parts of a tokenizer.json that are read here, and those that take memory."""

    model: _Model
    added_tokens: Annotated[list[_Added], Field(max_length=_MAX_ADDED)] | None = None
    normalizer: dict[str, object] | None = None
    pre_tokenizer: dict[str, object] | None = None
    decoder: dict[str, object] | None = None
    post_processor: dict[str, object] | None = None


def read_facts(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a tokenizer. UserError: it cannot be read, or is not an object."""
    try:
        facts = read_json(path, MAX_BYTES)
    except Unreadable as error:
        raise UserError(f"tokenizer {path}: {error}; legal is {LEGAL}") from None
    if not isinstance(facts, dict):
        raise UserError(f"tokenizer {path}: not a JSON object; legal is {LEGAL}")
    return facts


def library_of(facts: Mapping[str, Any], path: Path) -> LibraryTokenizer:
    """The library's tokenizer of the content of a tokenizer.json. UserError: it is invalid or too large; any Exception:
    the library's own."""
    found = recorded(TokenizerFacts, facts, f"tokenizer {path}")
    ids = found.model.vocab.values() if isinstance(found.model.vocab, dict) else [len(found.model.vocab) - 1]
    check_largest(max([*ids, *(token.id for token in found.added_tokens or [])], default=-1))
    library = LibraryTokenizer.from_str(json.dumps(facts))
    regexes = "".join(
        re.findall(r'"Regex": ("[^"]*")', json.dumps([facts.get("normalizer"), facts.get("pre_tokenizer")]))
    )
    for letter in dict.fromkeys(_PROBES + regexes[:1000]):
        library.encode(letter * _PROBE_LENGTH + "\0", add_special_tokens=False)
    return library


def reason_of(error: BaseException) -> str:
    """The message of an exception, in one printable line."""
    text = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return printable(" ".join(text.split()))[:_REASON] or type(error).__name__


class FailsOnText(UserError):
    """A tokenizer that was read but fails on some text."""


@contextmanager
def failures() -> Iterator[None]:
    """Around every call of the library on a text. FailsOnText: any failure, panics included."""
    try:
        yield
    except BaseException as error:
        # pyo3 creates the class of panics anew in each library, and it cannot be imported.
        known = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, UserError) or not known:
            raise
        raise FailsOnText(f"the tokenizer fails on a text ({reason_of(error)})") from None


@contextmanager
def reading(path: Path, legal: str) -> Iterator[None]:
    """Around the construction of a tokenizer. UserError, one line: any failure, with nothing from Rust on stderr."""
    try:
        with _quiet(), failures():
            yield
    except FailsOnText as error:  # which does not name the file
        reason = reason_of(error.__context__ or error)
        raise UserError(f"tokenizer {path} cannot be used ({reason}); legal is {legal}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Sends file descriptor 2 to the null device."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

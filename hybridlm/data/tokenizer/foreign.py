"""Tokenizer files that another may have made: read without running code, in a form that preserves every text.

The ``tokenizers`` library fails on some files in its own way: a Rust panic, which ``except Exception`` does not catch
and whose report goes to file descriptor 2, and tables as long as the largest id. So sizes are checked before the
library is called. Whatever a file adds to the text or takes from it (a space before it, special tokens around it,
padding, truncation, BPE dropout) is turned off.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.config.problems import recorded
from hybridlm.config.section import Section
from hybridlm.data.tokenizer.byte_strings import check_largest, parts
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import Unreadable, read_json

EOS = "<|endoftext|>"
_EOS_NAMES = (EOS, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")

_MARK = "end of document"  # in the list of a template
# Files of a run and of prepared data: next to them even a tokenizer.json without the mark is ours.
_BESIDE_OURS = ("config.yaml", "manifest.json")
_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
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


def saved_eos(facts: Mapping[str, Any], *, ours: bool = True) -> str | None:
    """The end-of-document token that a file of ours names, None: ``EOS``. The format has no field for it; a template
    that adds no token lists it.

    ours: no other program made the file. A file that another may have made counts only with our mark, since others list
    tokens for no purpose."""
    processor = facts.get("post_processor") or {}
    if processor.get("type") != "TemplateProcessing" or len(processor["special_tokens"]) != 1:
        return None
    ((name, listed),) = processor["special_tokens"].items()
    believed = ours or listed["tokens"] == [_MARK]
    return name if believed and all("Sequence" in piece for piece in processor["single"]) else None


def unmarked(facts: dict[str, Any]) -> dict[str, Any]:
    """``facts``, modified in place, as files of ours were before there was a mark: it keeps the fingerprints of old
    runs valid."""
    for name, listed in ((facts["post_processor"] or {}).get("special_tokens") or {}).items():
        if listed["tokens"] == [_MARK]:
            listed["tokens"] = [name]
    return facts


def read(path: Path, special_tokens: Sequence[str] = ()) -> LibraryTokenizer:
    """The tokenizer of a tokenizer.json or a folder with one, its end-of-document token recorded. Any Exception: it
    cannot be used.

    special_tokens: those that it lacks are added behind its ids.
    """
    unread = path.suffix in (".tiktoken", ".model")
    if unread or (path.is_dir() and not (path / "tokenizer.json").is_file()):
        call = "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
        reason = f"{path.suffix} files are not read" if unread else "the folder has no tokenizer.json"
        raise UserError(f"tokenizer {path}: {reason}; {call} writes one; legal is {LEGAL}")
    if path.is_dir():
        facts = read_facts(path / "tokenizer.json")
        return _build(facts, _folder_eos(path, _names(facts)), special_tokens, path)
    facts, ours = read_facts(path), any(path.with_name(name).is_file() for name in _BESIDE_OURS)
    return _build(facts, saved_eos(facts, ours=ours), special_tokens, path)


def _folder_eos(folder: Path, names: Mapping[str, int]) -> str | None:
    """The end-of-document token that tokenizer_config.json of a Hugging Face folder names, None if it does not."""
    path = folder / "tokenizer_config.json"
    eos = read_facts(path).get("eos_token") if path.is_file() else None
    name: str | None = eos.get("content") if isinstance(eos, dict) else eos
    if name is not None and name not in names:
        raise UserError(f"{path}: its end-of-document token {name!r} is not in the vocabulary; legal are its tokens")
    return name


def _names(facts: Mapping[str, Any]) -> dict[str, int]:
    """Token to id of a tokenizer.json before any change."""
    vocab = facts["model"]["vocab"]
    names = dict(vocab) if isinstance(vocab, dict) else {entry[0]: token for token, entry in enumerate(vocab)}
    return names | {token["content"]: token["id"] for token in facts.get("added_tokens") or []}


def _build(facts: dict[str, Any], eos: str | None, special_tokens: Sequence[str], path: Path) -> LibraryTokenizer:
    """The library's tokenizer of ``facts``, modified in place. eos: its end-of-document token if known."""
    names = _names(facts)
    usual = (name for name in _EOS_NAMES if name in names or name in special_tokens)
    eos = saved_eos(facts, ours=False) or eos or next(usual, None)
    added = facts["added_tokens"] = facts.get("added_tokens") or []
    if eos is None:
        own = ", ".join([token["content"] for token in added if token["special"]][:20]) or "none"
        raise UserError(
            f"tokenizer {path}: no end-of-document token; expected one of {', '.join(_EOS_NAMES)}; its special tokens:"
            f" {printable(own)[:500]}"
        )
    _keep_text_only(facts)
    largest = max(names.values(), default=-1)
    check_largest(largest)
    missing = [name for name in special_tokens if name not in names]
    added += [{"id": token, "content": name, **_SPECIAL} for token, name in enumerate(missing, largest + 1)]
    for token in added:
        token.update({"lstrip": False, "rstrip": False})  # they would swallow spaces of the text
        if token["content"] == eos:
            token.update({"special": True, "normalized": False})
    library = library_of(facts, path)
    moved = {token["content"]: token["id"] for token in added if library.token_to_id(token["content"]) != token["id"]}
    if moved and isinstance(facts["model"]["vocab"], dict):
        # The library numbers added tokens consecutively, except those that its model knows.
        facts["model"]["vocab"] |= moved
        library = library_of(facts, path)
    if wrong := [content for content, token in moved.items() if library.token_to_id(content) != token]:
        raise ValueError(f"the library gives its token {wrong[0]!r} an id other than {moved[wrong[0]]}")
    if eos not in {token["content"] for token in added}:
        library.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    if eos != EOS:
        listed = [{"id": eos, "ids": [library.token_to_id(eos)], "tokens": [_MARK]}]  # see saved_eos
        library.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=listed)
    return library


def _keep_text_only(facts: dict[str, Any]) -> None:
    """Turn off, in place, what adds to a text: above all the space before it, so that the first word is encoded as it
    is."""
    facts |= {"post_processor": None, "padding": None, "truncation": None}
    facts["model"].pop("dropout", None)
    for field, children, unwanted in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
        kept = [step for step in parts(facts.get(field)) if step["type"] != unwanted]
        if len(kept) < len(parts(facts.get(field))):
            facts[field] = {"type": "Sequence", children: kept} if kept else None
    for step in parts(facts.get("pre_tokenizer")):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for step in [*parts(facts.get("pre_tokenizer")), *parts(facts.get("decoder"))]:
        if step["type"] == "Metaspace":
            step.pop("add_prefix_space", None)
            step["prepend_scheme"] = "never"

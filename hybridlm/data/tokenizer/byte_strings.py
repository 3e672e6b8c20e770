"""Which tokenizers are lossless, and the bytes behind every id of theirs.

Two families preserve every text. Byte-level BPE (GPT-2, Llama 3, Qwen) writes each byte as a letter. SentencePiece with
byte fallback (Llama 2, Mistral, Gemma; BPE or Unigram) writes a space as ▁, and bytes without a token of their own as
<0x0A>.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

MARK = "▁"  # a space, in SentencePiece
_MAX_IDS = 1 << 20  # one stray id of a billion would otherwise be a table of a billion rows
_SPLITTERS = {"Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength"}  # they cut, and keep every character
_SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder of a tokenizer.json as a flat list of its steps."""
    for key in ("normalizers", "pretokenizers", "decoders"):
        if component and key in component:
            return [step for child in component[key] for step in parts(child)]
    return [component] if component else []


def is_byte_level(facts: Mapping[str, Any]) -> bool:
    """Whether tokens are spelled in letters for bytes; otherwise they are text."""
    return any(step["type"] == "ByteLevel" for step in parts(facts["pre_tokenizer"]))


def byte_letters() -> dict[str, int]:
    """The letter by which byte-level models write each byte (GPT-2's table): visible Latin-1 as itself, the rest as
    U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(value): value for value in visible} | {chr(256 + place): value for place, value in enumerate(hidden)}


def check(facts: Mapping[str, Any]) -> None:
    """ValueError, with the reason, if the tokenizer of this JSON does not preserve every text (NFC aside) or adds to
    it."""
    model, bytewise = facts["model"], is_byte_level(facts)
    normal, cut = parts(facts["normalizer"]), parts(facts["pre_tokenizer"])
    if model["type"] != "BPE" and (bytewise or model["type"] != "Unigram"):
        raise ValueError(f"its model is {model['type']}, which does not preserve all text")
    if not bytewise and not model.get("byte_fallback"):
        raise ValueError("it is not byte-level and has no byte fallback, so characters that it does not know are lost")
    if facts["padding"] or facts["truncation"] or model.get("dropout"):
        raise ValueError("it pads or truncates texts, or drops merges at random")
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise ValueError("its tokens carry word-boundary markers, which are not text")
    for step in normal:
        if step["type"] != "NFC" and (bytewise or step != _SPACE_TO_MARK):
            raise ValueError(f"its normalizer {step['type']} changes texts, which only NFC may")
    for step in cut:
        if step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never":
            raise ValueError("it puts a space before texts")
        if (
            step["type"] not in _SPLITTERS | {"ByteLevel" if bytewise else "Metaspace"}
            or step.get("behavior") == "Removed"
        ):
            raise ValueError(f"its pre-tokenizer {step['type']} does not keep every character")
    marks = _SPACE_TO_MARK in normal or any(step.get("replacement") == MARK for step in cut)
    if not bytewise and (not marks or any(step.get("replacement", MARK) != MARK for step in cut)):
        raise ValueError(f"it does not write spaces as {MARK}")


def check_largest(token: int) -> None:
    """ValueError if an id is so large that its tokenizer cannot be used; the library would take seconds to write the
    JSON for ``check``."""
    if token >= _MAX_IDS:
        raise ValueError(f"its largest id is {token}; expected below {_MAX_IDS}")


def byte_strings(library: LibraryTokenizer, facts: Mapping[str, Any]) -> list[bytes]:
    """The bytes of every id, in order; empty for special and unused ones. ValueError: a token is not a byte string, or
    a byte has no token."""
    bytewise, letters, model = is_byte_level(facts), byte_letters(), facts["model"]
    added = library.get_added_tokens_decoder()
    names: dict[int, str] = {}
    strings: dict[int, bytes] = {}
    for content, token in library.get_vocab(with_added_tokens=True).items():
        if names.setdefault(token, content) != content:
            raise ValueError(f"its id {token} has two tokens")
        # Even if it is declared special or unknown: the model writes bytes with it.
        if not bytewise and (match := _BYTE_TOKEN.fullmatch(content)):
            strings[token] = bytes.fromhex(match[1])
        elif (
            (token in added and added[token].special)
            or content == model.get("unk_token")
            or token == model.get("unk_id")
        ):
            strings[token] = b""
        elif not bytewise:
            strings[token] = content.replace(MARK, " ").encode()
        elif token in added:
            # They are found in the text after normalisation, so what is found is the normal form.
            normal = library.normalizer if added[token].normalized else None
            strings[token] = (normal.normalize_str(content) if normal is not None else content).encode()
        elif all(letter in letters for letter in content):
            strings[token] = bytes(letters[letter] for letter in content)
        else:
            raise ValueError(
                f"token {token} ({content!r}) is not written in bytes: only byte-level tokenizers preserve every text"
            )
    # UTF-8 has no other bytes.
    needed = [key for key, value in letters.items() if value not in (0xC0, 0xC1) and value < 0xF5]
    lacking = set(needed if bytewise else [f"<0x{value:02X}>" for value in range(256)]) - set(names.values())
    if lacking:
        raise ValueError(
            f"it has no token for {len(lacking)} bytes (one is {min(lacking)!r}), so some texts would be lost"
        )
    check_largest(max(names))
    return [strings.get(token, b"") for token in range(max(names) + 1)]

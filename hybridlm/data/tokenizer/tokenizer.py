"""The tokenizer: text to ids and back without loss, and the number of bytes behind every id.

Every id except the special ones stands for a fixed byte string, so ``sum(token_bytes()[ids])`` is the UTF-8 size of
what the ids decode to, and bits per byte is exact for every vocabulary: those made here, and those of other models.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.data.tokenizer.byte_strings import MARK, byte_strings, check, is_byte_level, parts
from hybridlm.data.tokenizer.cuts import PIECE_CHARS, batches, cut, places_to_cut
from hybridlm.data.tokenizer.foreign import EOS, failures, library_of, read_facts, reading, saved_eos, unmarked
from hybridlm.errors import UserError

_PROBE = "  Hello World! don't  naïve ☃ 你好 😀 \r\n\n\tx = 1234 __ ▁ <s>\n "
_SHOWN = 24  # words of a vocabulary in a message


class Tokenizer:
    """A tokenizer of the ``tokenizers`` library, reduced to what training and sampling need.

    Text is never searched for special tokens: ``<|endoftext|>`` written in a document is encoded as its 13 characters.
    No space is put before a text, so the first token of a document counts as its own bytes only.
    """

    def __init__(self, library: LibraryTokenizer) -> None:
        """ValueError: ``library`` has no end-of-document token, or decoding does not give texts back (NFC is
        accepted).

        That token is the one that ``load_tokenizer`` recorded in it, else ``<|endoftext|>``.
        """
        facts = json.loads(library.to_str())
        check(facts)
        name = saved_eos(facts) or EOS
        eos = library.token_to_id(name)
        if eos is None:
            raise ValueError(f"it has no {name} token")
        # Not part of the JSON, so set on every way in.
        library.encode_special_tokens = True
        self._library = library
        self._pieces = byte_strings(library, facts)
        self.eos_id: int = eos
        # Whether decode(encode(text)) == text for every text. If not, for texts in NFC, and others come back in NFC.
        self.lossless = all(step["type"] != "NFC" for step in parts(facts["normalizer"]))
        self._cuts = places_to_cut(facts, self._pieces)
        # SentencePiece writes a space and this sign alike, so the sign bypasses the library, as its three bytes.
        mark = [] if is_byte_level(facts) else [library.token_to_id(f"<0x{value:02X}>") for value in MARK.encode()]
        self._mark = [token for token in mark if token is not None]
        self._borders = self._find_borders()
        if not self._gives_back(_PROBE):
            raise ValueError(f"it does not give back the text {_PROBE!r}")

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest plus 1, special ids and gaps included."""
        return len(self._pieces)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's canonical JSON, without the mark that files of ours once lacked."""
        canonical = json.dumps(
            unmarked(json.loads(self._library.to_str())), sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def special_id(self, name: str) -> int | None:
        """The id of the special token ``name``, None if there is none; never that of a token that stands for text."""
        token = self._library.token_to_id(name)
        return None if token is None or self._pieces[token] else token

    def special_name(self, token: int) -> str | None:
        """The name of a special id, None for an unused one and for one that stands for text. ValueError: outside the
        vocabulary."""
        return None if self.bytes_of(token) else self._library.id_to_token(token)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no special ids are added. Starts none of the library's threads, which a process that forks
        later must not have."""
        ids: list[int] = []
        for piece in self._split(text):
            with failures():
                alone = self._mark and piece == MARK
                ids += self._mark if alone else self._library.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids (uint32) of each text in turn, on all cores; memory is bounded by the longest text's ids, not by the
        corpus."""
        held: list[np.ndarray] = []
        for group in batches(texts, self._split):
            with failures():
                encoded = self._library.encode_batch_fast([piece for piece, _ in group], add_special_tokens=False)
            for (piece, end), encoding in zip(group, encoded, strict=True):
                ids = self._mark if self._mark and piece == MARK else encoding.ids
                held.append(np.frombuffer(array("I", ids), dtype=np.uint32))  # in a third of the time of np.array
                if end:
                    yield held[0] if len(held) == 1 else np.concatenate(held)
                    held = []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special ids give nothing, bytes that are not UTF-8 become U+FFFD. ValueError: an id outside
        the vocabulary."""
        return b"".join(self.bytes_of(token) for token in ids).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes an id stands for; empty for a special or unused one. ValueError: an id outside the vocabulary."""
        if not 0 <= token < len(self._pieces):
            raise ValueError(f"token id {token} is outside the vocabulary of {len(self._pieces)}")
        return self._pieces[token]

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes each id stands for, int32 (V,); 0 for special and unused ids.

        Where ``lossless`` is False the sum over a text's ids is the size of its normal form, not of the text.
        """
        return np.array([len(piece) for piece in self._pieces], dtype=np.int32)

    def facts(self) -> dict[str, Any]:
        """The content of a file of ``save``."""
        facts: dict[str, Any] = json.loads(self._library.to_str())
        return facts

    def save(self, path: str | Path) -> None:
        """Write the JSON that ``load`` and the ``tokenizers`` library read."""
        Path(path).write_text(self._library.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a file of ``save``. It is JSON: no code runs.

        UserError: it is missing, damaged, or does not preserve texts (``load_tokenizer`` can fix that for files of
        other programs).
        """
        facts = read_facts(Path(path))
        model = facts.get("model")
        words = isinstance(model, dict) and model.get("type") == "WordLevel"
        with reading(Path(path), "the tokenizer.json of prepared data or of a run"):
            return (SymbolTokenizer if words else cls)(library_of(facts, Path(path)))

    def _find_borders(self) -> re.Pattern[str] | None:
        """What a text is cut behind before the library sees it, so that no text gives a special id or a byte that it
        does not have.

        A model takes <0x0A> or </s> in a text for its own token of that name if it is Unigram, has a merge for it or
        looks whole pieces up; cut behind their first character they are text. ValueError: a token for which that is
        not enough.
        """
        self._borders = re.compile(MARK) if self._mark else None
        found = [MARK] if self._mark else []
        for content, token in self._library.get_vocab(with_added_tokens=True).items():
            text = content.replace(MARK, " ") if self._mark else content
            a_byte = self._mark and re.fullmatch("<0x..>", text)
            if (self._pieces[token] and not a_byte) or self._gives_back(text):
                continue
            if not (self._gives_back(text[:1]) and self._gives_back(text[1:])):
                raise ValueError(f"a text with {content!r} cannot be distinguished from that token")
            found.append(f"{re.escape(text[0])}(?={re.escape(text[1:])})")
        return re.compile("|".join(found)) if found else None

    def _gives_back(self, text: str) -> bool:
        return self.decode(self.encode(text)) == text

    def _split(self, text: str) -> Iterator[str]:
        """``text`` in the parts that go to the library one by one, at least one."""
        begin = 0
        for match in self._borders.finditer(text) if self._borders else ():
            # The sign for a space stands alone, so that it is recognised.
            ends = [match.start(), match.end()] if match[0] == MARK and match.start() > begin else [match.end()]
            for end in ends:
                yield from cut(text[begin:end], PIECE_CHARS, self._cuts)
                begin = end
        if begin < len(text) or not text:
            yield from cut(text[begin:], PIECE_CHARS, self._cuts)


class SymbolTokenizer(Tokenizer):
    """Words separated by spaces, one id each, for a synthetic task: so that such a run can be read, loaded and resumed
    like any other. It does not preserve every text, so its ids count as no bytes: such a run has no bits per byte."""

    def __init__(self, library: LibraryTokenizer) -> None:
        """ValueError: it was not made by ``symbol_tokenizer``."""
        ids = library.get_vocab(with_added_tokens=True)
        if sorted(ids.values()) != list(range(len(ids))) or ids.get(EOS) != 0:
            raise ValueError(f"its words are not numbered from 0, or {EOS} is not the first")
        words = sorted(ids, key=ids.__getitem__)
        self._library, self.lossless, self.eos_id = library, False, 0
        self._ids = {word: ids[word] for word in words[1:]}
        self._pieces = [b"", *(f" {word}".encode() for word in words[1:])]

    def encode(self, text: str) -> list[int]:
        """The ids of the words. UserError: an unknown word."""
        unknown = next((word for word in text.split() if word not in self._ids), None)
        if unknown is not None:
            legal = ", ".join(list(self._ids)[:_SHOWN]) + (", ..." if len(self._ids) > _SHOWN else "")
            raise UserError(
                f"{unknown!r} is not a word of this run's synthetic task; expected, separated by spaces: {legal}"
            )
        return [self._ids[word] for word in text.split()]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        return (np.array(self.encode(text), dtype=np.uint32) for text in texts)

    def token_bytes(self) -> np.ndarray:
        return np.zeros(self.vocab_size, dtype=np.int32)


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of a character until it is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete, maybe empty."""
        return self._decoder.decode(b"".join(self._tokenizer.bytes_of(token) for token in ids))

    def flush(self) -> str:
        """What is held back, U+FFFD for an unfinished character; the decoder is as new afterwards."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

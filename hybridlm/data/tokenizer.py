"""Tokenizers: text to ids and back without loss, and the number of bytes behind every id.

Every id but the special ones stands for a fixed string of bytes, so ``sum(token_bytes()[ids])`` is the size in UTF-8 of
what the ids decode to, and bits per byte is exact for every vocabulary: those made here, and those of other models that
``load_tokenizer`` reads.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.data.reading.documents import encodable
from hybridlm.data.tokenizer_bytes import MARK, byte_letters, byte_strings, check, is_byte_level, parts
from hybridlm.data.tokenizer_files import EOS, read, saved_eos, unmarked
from hybridlm.data.tokenizer_library import LEGAL, failures, library_of, read_facts, reading
from hybridlm.data.tokenizer_pieces import PIECE_CHARS, SPLIT_PATTERN, batches, cut, places_to_cut, to_learn, too_long
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.home import expanded

_PROBE = "  Hello World! don't  naïve ☃ 你好 😀 \r\n\n\tx = 1234 __ ▁ <s>\n "


class Tokenizer:
    """A tokenizer of the ``tokenizers`` library, reduced to what training and sampling need.

    Text is never searched for special tokens: ``<|endoftext|>`` written in a document is encoded as its 13 characters.
    No blank is put before a text, so the first token of a document counts as its own bytes, no more.
    """

    def __init__(self, library: LibraryTokenizer) -> None:
        """Raises ValueError if ``library`` has no end-of-document token or does not give texts back; NFC is let
        through.

        That token is the one that ``load_tokenizer`` wrote down in it, else ``<|endoftext|>``.
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
        self._lossless = all(step["type"] != "NFC" for step in parts(facts["normalizer"]))
        self._cuts = places_to_cut(facts, self._pieces)
        # SentencePiece has one sign for a blank and for itself, so that sign goes around the library, as its three
        # bytes.
        self._mark = (
            None if is_byte_level(facts) else [library.token_to_id(f"<0x{value:02X}>") for value in MARK.encode()]
        )
        self._borders = self._find_borders()
        if self.decode(self._encode_alone(_PROBE)) != _PROBE:
            raise ValueError(f"it does not give back the text {_PROBE!r}")

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest one and 1, special ids and gaps included."""
        return len(self._pieces)

    @property
    def lossless(self) -> bool:
        """Whether ``decode(encode(text)) == text`` for every text. If not, that holds for texts in NFC, and others come
        back in NFC."""
        return self._lossless

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's canonical JSON, without the mark that files of ours once lacked."""
        canonical = json.dumps(
            unmarked(json.loads(self._library.to_str())), sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def special_id(self, name: str) -> int | None:
        """The id of the special token ``name``, None if it has none; never that of a token that stands for text."""
        token = self._library.token_to_id(name)
        return None if token is None or self._pieces[token] else token

    def special_name(self, token: int) -> str | None:
        """The name of a special id, None for an unused one and for one that stands for text. ValueError: outside the
        vocabulary."""
        return None if self.bytes_of(token) else self._library.id_to_token(token)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no special ids are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        return [ids.tolist() for ids in self.encode_documents(texts)]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids (uint32) of each text in turn; memory is bounded by the longest text's ids, not by the corpus."""
        held: list[np.ndarray] = []
        for pieces, ends in batches(texts, self._split):
            with failures():
                encoded = self._library.encode_batch_fast(pieces, add_special_tokens=False)
            for piece, encoding, end in zip(pieces, encoded, ends, strict=True):
                ids = self._mark if self._mark and piece == MARK else encoding.ids
                held.append(
                    np.frombuffer(array("I", ids), dtype=np.uint32)
                )  # in a third of the time that np.array takes
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

    def save(self, path: str | Path) -> None:
        """Write the JSON that ``load`` and the ``tokenizers`` library read."""
        Path(path).write_text(self._library.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a file of ``save``. It is JSON: no code runs.

        UserError: it is missing, damaged, or does not keep texts as they are (which ``load_tokenizer`` may put right).
        """
        from hybridlm.data.tokenizer_symbols import SymbolTokenizer, of_symbols  # which is a Tokenizer itself

        facts = read_facts(Path(path))
        with reading(Path(path), "the tokenizer.json of prepared data or of a run"):
            return (SymbolTokenizer if of_symbols(facts) else cls)(library_of(facts, Path(path)))

    def too_long(self, text: str) -> int:
        """Characters of a stretch of ``text`` that would be encoded at once and take too much memory; 0: there is
        none."""
        return too_long(text, self._cuts)

    def _encode_alone(self, text: str) -> list[int]:
        """``encode`` without the library's threads, which a process that forks later must not have started."""
        ids: list[int] = []
        for piece in self._split(text):
            ids += (
                self._mark
                if self._mark and piece == MARK
                else self._library.encode(piece, add_special_tokens=False).ids
            )
        return ids

    def _find_borders(self) -> re.Pattern[str] | None:
        """What a text is cut behind before the library sees it, so that no text gives a special id or a byte that it
        does not have.

        A model takes <0x0A> or </s> in a text for its own token of that name if it is Unigram, has a merge for it or
        looks whole pieces up; cut behind their first sign they are text. ValueError: a token for which that is not
        enough.
        """
        self._borders = None if self._mark is None else re.compile(MARK)
        found = [] if self._mark is None else [MARK]
        for content, token in self._library.get_vocab(with_added_tokens=True).items():
            text = content.replace(MARK, " ") if self._mark else content
            a_byte = self._mark and re.fullmatch("<0x..>", text)
            if (self._pieces[token] and not a_byte) or self._gives_back(text):
                continue
            if not (self._gives_back(text[:1]) and self._gives_back(text[1:])):
                raise ValueError(f"a text with {content!r} cannot be told from that token")
            found.append(f"{re.escape(text[0])}(?={re.escape(text[1:])})")
        return re.compile("|".join(found)) if found else None

    def _gives_back(self, text: str) -> bool:
        return self.decode(self._encode_alone(text)) == text

    def _split(self, text: str) -> Iterator[str]:
        """``text`` in the parts that go to the library one by one, at least one."""
        begin = 0
        for match in self._borders.finditer(text) if self._borders else ():
            # The blank's sign stands alone, so that it is recognised.
            if match[0] == MARK and match.start() > begin:
                yield from cut(text[begin : match.start()], PIECE_CHARS, self._cuts)
                begin = match.start()
            yield from cut(text[begin : match.end()], PIECE_CHARS, self._cuts)
            begin = match.end()
        if begin < len(text) or not text:
            yield from cut(text[begin:], PIECE_CHARS, self._cuts)


def load_tokenizer(path: str | Path, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of another model: a tokenizer.json, a Hugging Face folder, or tiktoken's NAME.tiktoken. No code of
    it runs.

    Its texts keep their ids but for what is not text: no blank is put before a document, no special tokens around it or
    found in it. Those of ``special_tokens`` that it lacks are added behind its vocabulary. ConfigError, one line: it
    cannot be read, names no end-of-document token, does not keep every text, or has one of ``special_tokens`` as a
    token of text.
    """
    _check_names(special_tokens)
    with reading(Path(path), LEGAL):
        tokenizer = Tokenizer(read(expanded(path), special_tokens))
    for name in special_tokens:
        if tokenizer.special_id(name) is None:
            raise _wrong_name(name, f"is an ordinary token of {path}")
    return tokenizer


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


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` ids, specials included; fewer if no pair is left that occurs twice.

    ``<|endoftext|>`` is id 0, ``special_tokens`` follow, then the bytes. The same texts give the same tokenizer.
    ConfigError: ``vocab_size`` has no room for the 256 bytes and the special ids, or one of ``special_tokens`` cannot
    be one.
    """
    specials = _specials(special_tokens)
    if vocab_size < 256 + len(specials):
        raise ConfigError(
            f"data.tokenizer.vocab_size={vocab_size}: legal is {256 + len(specials)} (256 bytes and"
            f" {', '.join(specials)}) or more"
        )
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is the corpus by heart, not a habit of the language
        show_progress=False,
        special_tokens=[_special(name) for name in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # In parts: the library takes many times the memory of what it is given at once.
    library.train_from_iterator((part for text in texts for part in to_learn(text)), trainer)
    # The trainer gives a merge the id of the special token that is written like it, and its text would be lost.
    merged = {"".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]}
    for name in specials:
        if name in merged:
            raise _wrong_name(name, "became an ordinary token of this corpus")
    return Tokenizer(library)


def byte_tokenizer(special_tokens: Sequence[str] = ()) -> Tokenizer:
    """One id per byte (id = value of the byte), then ``<|endoftext|>`` = 256, then ``special_tokens``.

    ConfigError: one of ``special_tokens`` cannot be one.
    """
    library = LibraryTokenizer(models.BPE(vocab=byte_letters(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([_special(name) for name in _specials(special_tokens)])
    return Tokenizer(library)


def _specials(names: Sequence[str]) -> list[str]:
    """The special tokens of a new tokenizer, in the order of their ids."""
    _check_names(names)
    return [EOS, *(name for name in names if name != EOS)]


def _check_names(names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise _wrong_name(name, "stands there twice")
        if len(name.strip()) < 2:
            raise _wrong_name(name, "is text that many documents contain" if name else "is empty")
        if not encodable(name):
            raise _wrong_name(name, "is not text (half a surrogate pair)")


def _wrong_name(name: str, reason: str) -> UserError:
    return ConfigError(
        f"data.tokenizer.special_tokens: {name!r} {reason}; legal is a name of two characters or more that is no text,"
        " such as <|user|>"
    )


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)

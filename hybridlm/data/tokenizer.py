"""Byte-level tokenizers: text to ids and back without loss, and the number of bytes behind every id.

Every id but the special ones stands for a fixed string of bytes, so ``sum(token_bytes()[ids])`` is the size of the text in UTF-8
and bits per byte is exact for every vocabulary.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.config.section import ConfigError

EOS = "<|endoftext|>"

# The pieces across whose borders BPE may not merge. GPT-4's pattern without its rule for English contractions, which tears 'type' into
# 't + ype + ' in code and is not needed: a word may begin with one sign, so don't is don + 't either way. Combining marks count as letters.
# Digits go in groups of at most three, a run of blanks leaves its last one to the word behind it (so that a depth of indentation can be one
# token), and line ends close what stands before them.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# A line end before a sign that is not a blank always ends a piece of SPLIT_PATTERN: text cut there has the ids of the whole.
_SAFE_CUT = re.compile(r"\n(?=\S)")
_PIECE_CHARS = 1 << 20  # the library keeps about 100 bytes per token while it works, so long documents go through in pieces
_BATCH_CHARS = 4 << 20


class Tokenizer:
    """A byte-level tokenizer of the ``tokenizers`` library, reduced to what training and sampling need.

    Text is never searched for special tokens: ``<|endoftext|>`` written in a document is encoded as its 13 characters.
    """

    def __init__(self, library: LibraryTokenizer) -> None:
        """Raises ValueError if ``library`` normalises text, has no ``<|endoftext|>``, or has ids that are not strings of bytes."""
        if library.normalizer is not None:
            raise ValueError("it normalises text, so bytes per token are not exact")
        eos = library.token_to_id(EOS)
        if eos is None:
            raise ValueError(f"it has no {EOS} token")
        # Not part of the JSON, so set on every way in.
        library.encode_special_tokens = True
        self._library = library
        self._pieces = _byte_strings(library)
        self.eos_id: int = eos

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self._pieces)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's canonical JSON."""
        canonical = json.dumps(json.loads(self._library.to_str()), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no special ids are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        return [ids.tolist() for ids in self.encode_documents(texts)]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids (uint32) of each text in turn; memory is bounded by the longest text's ids, not by the corpus."""
        parts: list[np.ndarray] = []
        for pieces, ends in _batches(texts):
            encoded = self._library.encode_batch_fast(pieces, add_special_tokens=False)
            for encoding, end in zip(encoded, ends, strict=True):
                parts.append(np.array(encoding.ids, dtype=np.uint32))
                if end:
                    yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                    parts = []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special ids give nothing, bytes that are not UTF-8 become U+FFFD. ValueError: an id outside the vocabulary."""
        return b"".join(self.bytes_of(token) for token in ids).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes an id stands for; empty for a special one. ValueError: an id outside the vocabulary."""
        if not 0 <= token < len(self._pieces):
            raise ValueError(f"token id {token} is outside the vocabulary of {len(self._pieces)}")
        return self._pieces[token]

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes each id stands for, int32 (V,); 0 for special ids."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int32)

    def save(self, path: str | Path) -> None:
        """Write the JSON that ``load`` and the ``tokenizers`` library read."""
        Path(path).write_text(self._library.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a file of ``save``. It is JSON: no code runs.

        ConfigError: it is missing, damaged, or not a byte-level tokenizer with ``<|endoftext|>``.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tokenizer {path} cannot be read: {error}") from None
        try:
            return cls(LibraryTokenizer.from_str(text))
        except Exception as error:  # the library raises plain Exception for anything it cannot parse
            raise ConfigError(
                f"tokenizer {path} cannot be used ({error}); legal is the tokenizer.json of prepared data or of a run"
            ) from None


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


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` ids, specials included; fewer if no pair is left that occurs twice.

    The same texts give the same tokenizer. ConfigError: ``vocab_size`` has no room for the 256 bytes and the special ids.
    """
    if vocab_size < 257:
        raise ConfigError(f"data.tokenizer.vocab_size={vocab_size}: legal is 257 (256 bytes and {EOS}) or more")
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is the corpus by heart, not a habit of the language
        show_progress=False,
        special_tokens=[_special(EOS)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    library.train_from_iterator(texts, trainer)
    return Tokenizer(library)


def byte_tokenizer() -> Tokenizer:
    """One id per byte (id = value of the byte), then ``<|endoftext|>`` = 256."""
    library = LibraryTokenizer(models.BPE(vocab=_letters(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([_special(EOS)])
    return Tokenizer(library)


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _letters() -> dict[str, int]:
    """The letter by which byte-level models write each byte (GPT-2's table): visible Latin-1 as itself, the rest as U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in set(visible)]
    table = {chr(value): value for value in visible}
    table.update({chr(256 + place): value for place, value in enumerate(hidden)})
    return table


def _byte_strings(library: LibraryTokenizer) -> list[bytes]:
    """The bytes of every id, in order of id."""
    letters = _letters()
    added = library.get_added_tokens_decoder()
    strings: dict[int, bytes] = {}
    for content, token in library.get_vocab(with_added_tokens=True).items():
        if token in added:
            strings[token] = b"" if added[token].special else content.encode()
            continue
        if any(letter not in letters for letter in content):
            raise ValueError(f"token {token} ({content!r}) is not written in bytes: only byte-level tokenizers keep every text")
        strings[token] = bytes(letters[letter] for letter in content)
    if sorted(strings) != list(range(len(strings))):
        raise ValueError("its ids have gaps")
    return [strings[token] for token in range(len(strings))]


def _cut(text: str, limit: int) -> Iterator[str]:
    """``text`` in parts of about ``limit`` characters whose ids joined are the ids of the whole."""
    begin = 0
    while len(text) - begin > limit:
        match = _SAFE_CUT.search(text, begin + limit)
        if match is None:
            break
        yield text[begin : match.end()]
        begin = match.end()
    yield text[begin:]


def _batches(texts: Iterable[str]) -> Iterator[tuple[Sequence[str], Sequence[bool]]]:
    """Groups of parts for one call of the library, with the mark of each part that ends its text."""
    pieces: list[str] = []
    ends: list[bool] = []
    held = 0  # characters
    for text in texts:
        for piece in _cut(text, _PIECE_CHARS):
            pieces.append(piece)
            ends.append(False)
            held += len(piece)
            if held >= _BATCH_CHARS:
                # The last part's mark is not known yet, so it stays for the next group.
                yield pieces[:-1], ends[:-1]
                pieces, ends, held = pieces[-1:], ends[-1:], len(piece)
        ends[-1] = True
    if pieces:
        yield pieces, ends

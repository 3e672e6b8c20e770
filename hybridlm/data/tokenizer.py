"""Tokenizers: text to ids and back without loss, and the number of bytes behind every id.

Every id but the special ones stands for a fixed string of bytes, so ``sum(token_bytes()[ids])`` is the size in UTF-8 of what the ids
decode to, and bits per byte is exact for every vocabulary: those made here, and those of other models that ``load_tokenizer`` reads.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.config.section import ConfigError
from hybridlm.data.tokenizer_files import EOS, LEGAL, MARK, byte_letters, byte_strings, check, is_byte_level, parts, read, saved_eos

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
# Of GPT-2's, GPT-4's and their successors' patterns too: a run of line ends is not always one piece, and o200k_base draws in the / behind.
_FOREIGN_CUT = re.compile(r"(?<=\S)\n(?=[^\s/])")
_ACROSS_CUT = re.compile(rb"\n[^\s/]")
_PIECE_CHARS = 1 << 20  # the library keeps about 100 bytes per token while it works, so long documents go through in pieces
_BATCH_CHARS = 4 << 20
_PROBE = "  Hello World! don't  naïve ☃ 你好 😀 \r\n\n\tx = 1234 __ ▁ <s>\n "


class Tokenizer:
    """A tokenizer of the ``tokenizers`` library, reduced to what training and sampling need.

    Text is never searched for special tokens: ``<|endoftext|>`` written in a document is encoded as its 13 characters. No blank is put
    before a text, so the first token of a document counts as its own bytes, no more.
    """

    def __init__(self, library: LibraryTokenizer) -> None:
        """Raises ValueError if ``library`` has no end-of-document token or does not give texts back; NFC is let through.

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
        own = any(step.get("pattern") == {"Regex": SPLIT_PATTERN} for step in parts(facts["pre_tokenizer"]))
        across = not own and any(_ACROSS_CUT.search(piece) for piece in self._pieces)
        self._safe_cut = _SAFE_CUT if own else None if across else _FOREIGN_CUT
        # SentencePiece has one sign for a blank and for itself, so that sign goes around the library, as its three bytes.
        self._mark = None if is_byte_level(facts) else [library.token_to_id(f"<0x{value:02X}>") for value in MARK.encode()]
        self._borders = self._find_borders()
        if self.decode(self._encode_alone(_PROBE)) != _PROBE:
            raise ValueError(f"it does not give back the text {_PROBE!r}")

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest one and 1, special ids and gaps included."""
        return len(self._pieces)

    @property
    def lossless(self) -> bool:
        """Whether ``decode(encode(text)) == text`` for every text. If not, that holds for texts in NFC, and others come back in NFC."""
        return self._lossless

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
        held: list[np.ndarray] = []
        for pieces, ends in _batches(texts, self._split):
            encoded = self._library.encode_batch_fast(pieces, add_special_tokens=False)
            for piece, encoding, end in zip(pieces, encoded, ends, strict=True):
                held.append(np.array(self._mark if self._mark and piece == MARK else encoding.ids, dtype=np.uint32))
                if end:
                    yield held[0] if len(held) == 1 else np.concatenate(held)
                    held = []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special ids give nothing, bytes that are not UTF-8 become U+FFFD. ValueError: an id outside the vocabulary."""
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

        ConfigError: it is missing, damaged, or does not keep texts as they are (which ``load_tokenizer`` may put right).
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

    def _encode_alone(self, text: str) -> list[int]:
        """``encode`` without the library's threads, which a process that forks later must not have started."""
        ids: list[int] = []
        for piece in self._split(text):
            ids += self._mark if self._mark and piece == MARK else self._library.encode(piece, add_special_tokens=False).ids
        return ids

    def _find_borders(self) -> re.Pattern[str] | None:
        """What a text is cut behind before the library sees it, so that no text gives a special id or a byte that it does not have.

        A model takes <0x0A> or </s> in a text for its own token of that name if it is Unigram, has a merge for it or looks whole pieces up;
        cut behind their first sign they are text. ValueError: a token for which that is not enough.
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
                yield from _cut(text[begin : match.start()], _PIECE_CHARS, self._safe_cut)
                begin = match.start()
            yield from _cut(text[begin : match.end()], _PIECE_CHARS, self._safe_cut)
            begin = match.end()
        if begin < len(text) or not text:
            yield from _cut(text[begin:], _PIECE_CHARS, self._safe_cut)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of another model: a tokenizer.json, a Hugging Face folder, or tiktoken's NAME.tiktoken. No code of it runs.

    Its texts keep their ids but for what is not text: no blank is put before a document, no special tokens around it or found in it.
    ConfigError, one line: it cannot be read, names no end-of-document token, or does not keep every text.
    """
    try:
        return Tokenizer(read(Path(path).expanduser()))
    except ConfigError:
        raise
    except Exception as error:  # as in Tokenizer.load
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ConfigError(f"tokenizer {path} cannot be used ({reason}); legal is {LEGAL}") from None


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
    library = LibraryTokenizer(models.BPE(vocab=byte_letters(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([_special(EOS)])
    return Tokenizer(library)


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _cut(text: str, limit: int, safe: re.Pattern[str] | None = _SAFE_CUT) -> Iterator[str]:
    """``text`` in parts of about ``limit`` characters whose ids joined are those of the whole; cut at ``safe``, None: nowhere."""
    begin = 0
    while safe is not None and len(text) - begin > limit:
        match = safe.search(text, begin + limit)
        if match is None:
            break
        yield text[begin : match.end()]
        begin = match.end()
    yield text[begin:]


def _batches(texts: Iterable[str], split: Callable[[str], Iterable[str]]) -> Iterator[tuple[Sequence[str], Sequence[bool]]]:
    """Groups of the parts that ``split`` makes, for one call of the library, with the mark of each part that ends its text."""
    pieces: list[str] = []
    ends: list[bool] = []
    held = 0  # characters
    for text in texts:
        for piece in split(text):
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

"""Tokenizers made here or loaded from other models, with the special tokens that a run asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.data.reading.documents import encodable
from hybridlm.data.tokenizer.byte_strings import byte_letters
from hybridlm.data.tokenizer.cuts import SPLITS, to_learn
from hybridlm.data.tokenizer.foreign import EOS, LEGAL, read, reading
from hybridlm.data.tokenizer.tokenizer import SymbolTokenizer, Tokenizer
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.home import expanded


def load_tokenizer(path: str | Path, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of another model: a tokenizer.json, or a Hugging Face folder with one. No code of it runs.

    Its texts keep their ids except for what is not text: no space is put before a document, no special tokens around
    it or found in it. Those of ``special_tokens`` that it lacks are added behind its vocabulary. UserError, one line:
    it cannot be read, names no end-of-document token, does not preserve every text, or has one of ``special_tokens``
    as a token of text.
    """
    _check_names(special_tokens)
    with reading(Path(path), LEGAL):
        tokenizer = Tokenizer(read(expanded(path), special_tokens))
    for name in special_tokens:
        if tokenizer.special_id(name) is None:
            raise _wrong_name(name, f"is an ordinary token of {path}")
    return tokenizer


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (), split: str = "hybridlm"
) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` ids, specials included; fewer if no pair is left that occurs twice.
    split: the pattern of ``SPLITS`` that cuts text into pieces.

    ``<|endoftext|>`` is id 0, ``special_tokens`` follow, then the bytes. The same texts give the same tokenizer.
    ConfigError: ``vocab_size`` has no room for the 256 bytes and the special ids, or one of ``special_tokens`` is
    unusable.
    """
    specials = _specials(special_tokens)
    if vocab_size < 256 + len(specials):
        raise ConfigError(
            f"data.tokenizer.vocab_size={vocab_size}: expected {256 + len(specials)} (256 bytes and"
            f" {', '.join(specials)}) or more"
        )
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is memorising the corpus
        show_progress=False,
        special_tokens=[_special(name) for name in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # In parts: the library takes many times the memory of what it is given at once.
    library.train_from_iterator((part for text in texts for part in to_learn(text)), trainer)
    # The trainer gives a merge the id of the special token that is spelled like it, and its text would be lost.
    merged = {"".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]}
    if taken := merged.intersection(specials):
        raise _wrong_name(taken.pop(), "became an ordinary token of this corpus")
    return Tokenizer(library)


def byte_tokenizer(special_tokens: Sequence[str] = ()) -> Tokenizer:
    """One id per byte (id = value of the byte), then ``<|endoftext|>`` = 256, then ``special_tokens``.

    ConfigError: one of ``special_tokens`` is unusable.
    """
    library = LibraryTokenizer(models.BPE(vocab=byte_letters(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([_special(name) for name in _specials(special_tokens)])
    return Tokenizer(library)


def symbol_tokenizer(words: Sequence[str]) -> SymbolTokenizer:
    """The tokenizer whose ids are the positions in ``words``, the first of which ends a document."""
    library = LibraryTokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=EOS))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([_special(EOS)])
    return SymbolTokenizer(library)


def _specials(names: Sequence[str]) -> list[str]:
    """The special tokens of a new tokenizer, in the order of their ids."""
    _check_names(names)
    return [EOS, *(name for name in names if name != EOS)]


def _check_names(names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        reasons = {
            "is listed twice": name in names[:place],
            "is empty": not name,
            "is text that many documents contain": len(name.strip()) < 2,
            "is not text (half a surrogate pair)": not encodable(name),
        }
        if reason := next((reason for reason, applies in reasons.items() if applies), ""):
            raise _wrong_name(name, reason)


def _wrong_name(name: str, reason: str) -> UserError:
    return ConfigError(
        f"data.tokenizer.special_tokens: {name!r} {reason}; expected a name of two characters or more that is not text,"
        " such as <|user|>"
    )


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)

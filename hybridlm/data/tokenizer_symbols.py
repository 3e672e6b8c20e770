"""The tokenizer of a synthetic task: a word for each id. It exists so that such a run can be read, loaded and continued
like any other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.data.tokenizer_files import EOS
from hybridlm.errors import UserError

_SHOWN = 24  # words of the vocabulary in a message


class SymbolTokenizer(Tokenizer):
    """Words with blanks between them, each an id. It does not keep every text, so the bytes of its ids count as none:
    of such a run there are no bits per byte."""

    def __init__(self, library: LibraryTokenizer) -> None:
        """ValueError: it is none of ``symbol_tokenizer``."""
        ids = library.get_vocab(with_added_tokens=True)
        if sorted(ids.values()) != list(range(len(ids))) or ids.get(EOS) != 0:
            raise ValueError(f"its words do not count from 0 on, or {EOS} is not the first")
        words = sorted(ids, key=ids.__getitem__)
        self._library, self._lossless, self.eos_id = library, False, 0
        self._ids = {word: ids[word] for word in words}
        self._pieces = [b"" if word == EOS else f" {word}".encode() for word in words]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each text's words. ConfigError: a word that is none."""
        for text in texts:
            unknown = next((word for word in text.split() if word not in self._ids or word == EOS), None)
            if unknown is not None:
                legal = [word for word in self._ids if word != EOS][:_SHOWN]
                more = "" if len(legal) == len(self._ids) - 1 else ", ..."
                raise UserError(
                    f"{unknown!r} is no word of this run's synthetic task; legal: {', '.join(legal)}{more}, with blanks"
                    " between"
                )
            yield np.array([self._ids[word] for word in text.split()], dtype=np.uint32)

    def token_bytes(self) -> np.ndarray:
        return np.zeros(self.vocab_size, dtype=np.int32)


def symbol_tokenizer(words: Sequence[str]) -> SymbolTokenizer:
    """The tokenizer whose ids are the places of ``words``, the first of which is the end of a document."""
    library = LibraryTokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=EOS))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return SymbolTokenizer(library)


def of_symbols(facts: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is one of ``symbol_tokenizer``."""
    model = facts.get("model")
    return isinstance(model, dict) and model.get("type") == "WordLevel"

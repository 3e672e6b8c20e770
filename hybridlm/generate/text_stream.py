"""The text of one row as it is generated, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridlm.data.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from hybridlm.data.tokenizer import Tokenizer


class TextStream:
    """Ids in, text out; an incomplete character, and what may be the start of a stop string, is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""

    def feed(self, token: int) -> tuple[str, bool]:
        """The text that is final now, and whether a stop string follows it."""
        return self._released(self._decoder.feed([token]))

    def flush(self) -> str:
        """At the end of the row, the text that was held back."""
        text, stopped = self._released(self._decoder.flush())
        held, self._held = self._held, ""
        return text if stopped else text + held

    def _released(self, new: str) -> tuple[str, bool]:
        self._held += new
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)

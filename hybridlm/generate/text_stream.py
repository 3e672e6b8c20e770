"""The text of one row as it is generated, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hybridlm.data.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Ids in, text out; an incomplete character, and what may be the start of a stop string, is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""

    def feed(self, token: int) -> tuple[str, bool]:
        """The text that is final now, and whether a stop string follows it."""
        return self._released(self._decoder.feed([token]), ended=False)

    def flush(self) -> str:
        """At the end of the row, the text that was held back."""
        return self._released(self._decoder.flush(), ended=True)[0]

    def _released(self, new: str, ended: bool) -> tuple[str, bool]:
        held = self._held + new
        places = [place for text in self._stop if (place := held.find(text)) >= 0]
        keep = 0 if ended else max((_overlap(held, text) for text in self._stop), default=0)
        end = min(places, default=len(held) - keep)
        self._held = "" if places else held[end:]
        return held[:end], bool(places)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)

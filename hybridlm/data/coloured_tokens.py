"""Tokens made visible: in alternating colours, so that their boundaries show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.text import Text

from hybridlm.data.files.stream import TokenStream
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import harmless

_STYLES = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
_SPECIAL = "bold white on red"
_LONGEST = 1 << 16  # tokens of a document on a screen
_READ, _READ_SPECIAL = "bright_black", "red"  # what is not learned has no background
# Spaces and line ends would show only as a colour; the line still breaks after its end.
_VISIBLE = str.maketrans({" ": "·", "\t": "→", "\r": "␍", "\n": "⏎\n"})


def coloured(ids: Iterable[int], tokenizer: Tokenizer, learned: Sequence[bool] | np.ndarray | None = None) -> Text:
    """The tokens one after the other; bytes that are not a whole character as \\xNN, special tokens by name, unused ids
    as <id>.

    learned: for each token whether it is learned; those that are not have no background. None: all are. ValueError: the
    lengths differ.
    """
    tokens = list(ids)
    shown = Text()
    for place, (token, bright) in enumerate(
        zip(tokens, [True] * len(tokens) if learned is None else learned, strict=True)
    ):
        data = tokenizer.bytes_of(token)
        if data:
            style = _STYLES[place % len(_STYLES)] if bright else _READ
            shown.append(harmless(data.decode("utf-8", errors="backslashreplace").translate(_VISIBLE)), style=style)
        else:
            name = "<eos>" if token == tokenizer.eos_id else tokenizer.special_name(token) or f"<{token}>"
            shown.append(harmless(name), style=_SPECIAL if bright else _READ_SPECIAL)
    return shown


def legend() -> Text:
    """What the colours of ``coloured`` mean where only some tokens are learned, in one line."""
    shown = Text("learned: ")
    for style, word in zip(_STYLES, ("one", "colour", "a", "token"), strict=True):
        shown.append(word, style=style)
    shown.append(" and ").append("<special>", style=_SPECIAL)
    shown.append("; context only: ").append("text", style=_READ)
    return shown.append(" and ").append("<special>", style=_READ_SPECIAL)


def first_documents(stream: TokenStream, eos_id: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The first documents of a stream: ids (n,), with the eos before each, and which are learned (n,) bool, None if all
    are. Long documents are truncated.
    """
    first = 0
    for _ in range(count):
        if first >= len(stream) - 1:  # the last eos closes the stream
            return
        read = stream.read(first, min(_LONGEST, len(stream) - first))
        borders = np.flatnonzero(read[1:] == eos_id)
        length = int(borders[0]) + 1 if borders.size else read.size
        yield read[:length], stream.read_learned(first, length) if stream.masked else None
        first += length

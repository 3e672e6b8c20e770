"""Tokens made visible: in alternating colours, so that their boundaries show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice

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
    brights = [True] * len(tokens) if learned is None else learned
    for token, bright, colour in zip(tokens, brights, islice(cycle(_STYLES), len(tokens)), strict=True):
        text, style = tokenizer.bytes_of(token).decode("utf-8", errors="backslashreplace").translate(_VISIBLE), colour
        if not text:
            text = "<eos>" if token == tokenizer.eos_id else tokenizer.special_name(token) or f"<{token}>"
            style = _SPECIAL
        shown.append(harmless(text), style=style if bright else _READ_SPECIAL if style == _SPECIAL else _READ)
    return shown


def legend() -> Text:
    """What the colours of ``coloured`` mean where only some tokens are learned, in one line."""
    colours = zip(("one", "colour", "a", "token"), _STYLES, strict=True)
    learned = Text.assemble("learned: ", *colours, " and ", ("<special>", _SPECIAL))
    return learned + Text.assemble("; context only: ", ("text", _READ), " and ", ("<special>", _READ_SPECIAL))


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

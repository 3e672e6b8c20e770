"""Tokens as a person can see them: each on a colour of its own, so that the borders show."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from hybridlm.data.tokenizer import Tokenizer

_STYLES = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
_SPECIAL = "bold white on red"
# Blanks and line ends would show as a colour alone; the line is broken behind its end all the same.
_VISIBLE = str.maketrans({" ": "·", "\t": "→", "\r": "␍", "\n": "⏎\n"})


def coloured(ids: Iterable[int], tokenizer: Tokenizer) -> Text:
    """The tokens one after the other; bytes that are no whole character stand as \\xNN, an id without bytes as <id>."""
    shown = Text()
    for place, token in enumerate(ids):
        data = tokenizer.bytes_of(token)
        if data:
            shown.append(data.decode("utf-8", errors="backslashreplace").translate(_VISIBLE), style=_STYLES[place % len(_STYLES)])
        else:
            shown.append("<eos>" if token == tokenizer.eos_id else f"<{token}>", style=_SPECIAL)
    return shown

"""How text is cut: into the pieces across which BPE may not merge, and into parts of bounded size with the ids of the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

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
SAFE_CUT = re.compile(r"\n(?=\S)")
# Of GPT-2's, GPT-4's and their successors' patterns too: a run of line ends is not always one piece, and o200k_base draws in the / behind.
FOREIGN_CUT = re.compile(r"(?<=\S)\n(?=[^\s/])")
ACROSS_CUT = re.compile(rb"\n[^\s/]")
PIECE_CHARS = 1 << 20  # the library keeps about 100 bytes per token while it works, so long documents go through in pieces
BATCH_CHARS = 1 << 20
_PART_CHARS = 32  # a part costs the library about as much memory as so many characters, however short it is


def cut(text: str, limit: int, safe: re.Pattern[str] | None = SAFE_CUT) -> Iterator[str]:
    """``text`` in parts of about ``limit`` characters whose ids joined are those of the whole; cut at ``safe``, None: nowhere."""
    begin = 0
    while safe is not None and len(text) - begin > limit:
        match = safe.search(text, begin + limit)
        if match is None:
            break
        yield text[begin : match.end()]
        begin = match.end()
    yield text[begin:]


def batches(texts: Iterable[str], split: Callable[[str], Iterable[str]]) -> Iterator[tuple[Sequence[str], Sequence[bool]]]:
    """Groups of the parts that ``split`` makes, for one call of the library, with the mark of each part that ends its text."""
    pieces: list[str] = []
    ends: list[bool] = []
    held = 0  # characters
    for text in texts:
        for piece in split(text):
            pieces.append(piece)
            ends.append(False)
            held += len(piece) + _PART_CHARS
            if held >= BATCH_CHARS:
                # The last part's mark is not known yet, so it stays for the next group.
                yield pieces[:-1], ends[:-1]
                pieces, ends, held = pieces[-1:], ends[-1:], len(piece) + _PART_CHARS
        ends[-1] = True
    if pieces:
        yield pieces, ends

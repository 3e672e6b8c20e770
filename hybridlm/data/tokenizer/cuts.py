"""How text is cut: into the pieces across which BPE may not merge, and into parts of bounded size that have the ids of
the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hybridlm.data.tokenizer.byte_strings import parts

# The pieces across whose borders BPE may not merge. GPT-4's pattern without its rule for English contractions, which
# splits 'type' into 't + ype + ' in code and is not needed: a word may begin with one sign, so don't is don + 't either
# way. Combining marks count as letters. Digits form groups of at most three, a run of spaces leaves its last one to
# the word after it (so that a level of indentation can be one token), and line ends close what is before them.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
# By the names of data.tokenizer.split. Llama 3's is the one nearest to ours that llama.cpp knows: it has a rule for
# contractions, and combining marks are no letters.
SPLITS = {
    "hybridlm": SPLIT_PATTERN,
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    ),
}

# Places where text can be cut without changing its ids, the preferred ones first. For SPLIT_PATTERN: a line end before
# a non-space always ends a piece; a space after a non-space begins one, and so does a punctuation mark after a letter
# or a digit.
_SPACE = re.compile(r"(?<=\S)(?= )")
OWN_CUTS = (
    re.compile(r"\n(?=\S)"),
    _SPACE,
    re.compile(r"(?<=[^\W_])(?=[,.;:!?…\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"),
)
# For the patterns of GPT-2, GPT-4 and their successors too: a run of line ends is not always one piece, and o200k_base
# includes a following /.
_LINE_END = re.compile(r"(?<=\S)\n(?=[^\s/])")
# Each with what no token may contain, or merges could reach across.
_FOREIGN_CUTS = (
    (_LINE_END, re.compile(r"\n[^\s/]")),
    (_SPACE, re.compile(r"\S ")),
    (re.compile(r"(?<=[^\W_])(?=[,.;:!?])"), re.compile(r"[^\W_,.;:!?][,.;:!?]|\ufffd[,.;:!?]")),
)
PIECE_CHARS = 1 << 20  # the library holds about 100 bytes per token while it works, so long documents go in pieces
BATCH_CHARS = 1 << 20
_PART_CHARS = 32  # a part costs the library about as much memory as so many characters, however short it is


# Training a BPE takes memory and time by the distinct pieces in its text: some 140 bytes for each of their bytes, and
# the square of their length. Words repeat; stretches of a script without spaces hardly ever do.
_RARE = re.compile(r"[^\W\d_]{9,}")
# So runs of letters, spaces or other signs longer than any word, indentation or ruler line are cut.
_LONG_LETTERS = re.compile(r"(?P<letters>(?<![^\W\d_])[^\W\d_]{65,})")
_MANY_SIGNS = re.compile(r"(?<![\W_])[\W_]{1025,}")  # a quick test for the runs below
_LONG_RUN = re.compile(rf"{_LONG_LETTERS.pattern}|(?<!\s)\s{{1025,}}|(?<!(?!\s)[\W_])(?:(?!\s)[\W_]){{1025,}}")
_LETTERS_AT_ONCE, _SIGNS_AT_ONCE = 64, 1024
MOST_RARE = 6_000_000  # bytes of distinct pieces of nine letters or more
_STRETCH, _WORTHWHILE = 1 << 16, 1 << 10  # characters of a text thinned at once, and taken at least

_LONGEST_PART = 2 * PIECE_CHARS  # characters encoded at once: a stretch without a place to cut is cut there
_LOOKED_BACK = 1 << 16  # characters


def cut(text: str, limit: int, places: Sequence[re.Pattern[str]]) -> Iterator[str]:
    """``text`` in parts whose concatenated ids are those of the whole: of ``limit`` to twice as many characters if one
    of ``places`` occurs there, else longer. Only where none occurs in two million characters, ids may differ."""
    begin = 0
    while len(text) - begin > limit:
        ends = (
            match.end()
            for longest in (2 * limit, _LONGEST_PART)
            for place in places
            if (match := place.search(text, begin + limit, begin + longest))
        )
        end = next(ends, begin + _LONGEST_PART)
        if end >= len(text):
            break
        yield text[begin:end]
        begin = end
    yield text[begin:]


def places_to_cut(facts: Mapping[str, Any], pieces: Sequence[bytes]) -> tuple[re.Pattern[str], ...]:
    """Where text can be cut for the tokenizer of a tokenizer.json, whose tokens stand for ``pieces``."""
    if any(step.get("pattern") == {"Regex": SPLIT_PATTERN} for step in parts(facts["pre_tokenizer"])):
        return OWN_CUTS
    texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
    return tuple(place for place, across in _FOREIGN_CUTS if not any(across.search(text) for text in texts))


def to_learn(text: str) -> Iterator[str]:
    """``text`` in parts for training a BPE: bounded in size, and cut inside runs too long to be words."""
    for part in cut(text, PIECE_CHARS, OWN_CUTS):
        begin = 0
        for match in (_LONG_RUN if _MANY_SIGNS.search(part) else _LONG_LETTERS).finditer(part):
            size = _LETTERS_AT_ONCE if match["letters"] else _SIGNS_AT_ONCE
            for end in range(match.start() + size, match.end(), size):
                yield part[begin:end]
                begin = end
        yield part[begin:]


def learnable(texts: Iterable[str]) -> float:
    """The share of ``texts`` on which a BPE can be trained in bounded memory, at most 1."""
    seen = set[int]()
    rare = size = good = 0
    for text in texts:
        for part in to_learn(text):
            size += len(part)
            if rare > MOST_RARE:
                continue
            good += len(part)
            for found in _RARE.findall(part):
                if (key := hash(found)) not in seen:
                    seen.add(key)
                    rare += len(found.encode())
    return 1.0 if rare <= MOST_RARE else good / size


def thinned(texts: Iterable[str], share: float) -> Iterator[str]:
    """``share`` of ``texts``: short ones entirely or not at all, the beginning of every ``_STRETCH`` of long ones."""
    if share == 1:
        yield from texts
        return
    due = 0.0
    for text in texts:
        for begin in range(0, len(text), _STRETCH):
            stretch = text[begin : begin + _STRETCH]
            due += share * len(stretch)
            if due >= min(len(stretch), _WORTHWHILE):
                yield stretch[: int(due)]
                due -= min(int(due), len(stretch))


def last_cut(text: str, at: int) -> int:
    """Where to cut ``text`` (two characters or more) at ``at`` or shortly before: after a line end, else before a
    space, so that its parts have the ids of the whole; else exactly there."""
    at = min(max(at, 1), len(text) - 1)
    near = max(1, at - _LOOKED_BACK)
    line_end, space = text.rfind("\n", near - 1, at) + 1, text.rfind(" ", near, at + 1)
    return line_end or (space if space > 0 else at)


def batches(texts: Iterable[str], split: Callable[[str], Iterable[str]]) -> Iterator[list[tuple[str, bool]]]:
    """Groups of the parts that ``split`` makes, one per call of the library, each with whether it ends its text."""
    group: list[tuple[str, bool]] = []
    held = 0  # characters
    for parts_of_text in map(list, map(split, texts)):
        for left, part in zip(reversed(range(len(parts_of_text))), parts_of_text, strict=True):
            group.append((part, not left))
            held += len(part) + _PART_CHARS
            if held >= BATCH_CHARS:
                yield group
                group, held = [], 0
    if group:
        yield group

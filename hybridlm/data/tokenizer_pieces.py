"""How text is cut: into the pieces across which BPE may not merge, and into parts of bounded size with the ids of the
whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hybridlm.data.tokenizer_bytes import is_byte_level, parts

# The pieces across whose borders BPE may not merge. GPT-4's pattern without its rule for English contractions, which
# tears 'type' into 't + ype + ' in code and is not needed: a word may begin with one sign, so don't is don + 't either
# way. Combining marks count as letters. Digits go in groups of at most three, a run of blanks leaves its last one to
# the word behind it (so that a depth of indentation can be one token), and line ends close what stands before them.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Places at which text may be cut and has the ids of the whole, the preferred ones first. Of SPLIT_PATTERN: a line end
# before a sign that is not a blank always ends a piece; a blank behind such a sign begins one, and so does a mark
# behind a letter or a digit.
_BLANK = re.compile(r"(?<=\S)(?= )")
OWN_CUTS = (
    re.compile(r"\n(?=\S)"),
    _BLANK,
    re.compile(r"(?<=[^\W_])(?=[,.;:!?…\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"),
)
# Of GPT-2's, GPT-4's and their successors' patterns too: a run of line ends is not always one piece, and o200k_base
# draws in the / behind.
_LINE_END = re.compile(r"(?<=\S)\n(?=[^\s/])")
# Each with what no token may hold, or merges could reach across.
_FOREIGN_CUTS = (
    (_LINE_END, re.compile(r"\n[^\s/]")),
    (_BLANK, re.compile(r"\S ")),
    (re.compile(r"(?<=[^\W_])(?=[,.;:!?])"), re.compile(r"[^\W_,.;:!?][,.;:!?]|\ufffd[,.;:!?]")),
)
_ANYWHERE = (re.compile(""),)
PIECE_CHARS = (
    1 << 20
)  # the library keeps about 100 bytes per token while it works, so long documents go through in pieces
BATCH_CHARS = 1 << 20
_PART_CHARS = 32  # a part costs the library about as much memory as so many characters, however short it is


# What a BPE learns from takes memory and time by the distinct pieces that it is given: some 140 bytes for each of their
# bytes, and the square of their length. Words repeat; stretches of a script without blanks hardly ever do.
_RARE = re.compile(r"[^\W\d_]{9,}")
_LEARNED_AT_ONCE = re.compile(r"[^\W\d_]{64}(?=[^\W\d_])")
MOST_RARE = 6_000_000  # bytes of distinct pieces of nine letters or more
_STRETCH, _WORTHWHILE = 1 << 16, 1 << 10  # characters of a text that are thinned at once, and that are taken at least

LONGEST_PART = (
    2 * PIECE_CHARS
)  # characters without a place to cut that are encoded at once; a document with more of them is left out
_LOOKED_BACK = 1 << 16  # characters


def cut(text: str, limit: int, places: Sequence[re.Pattern[str]]) -> Iterator[str]:
    """``text`` in parts whose ids joined are those of the whole: of ``limit`` to twice as many characters where one of
    ``places`` is to be found there, else longer."""
    begin = 0
    while len(text) - begin > limit:
        near = (place.search(text, begin + limit, begin + 2 * limit) for place in places)
        match = next((match for match in near if match is not None), None)
        if match is None:
            later = (place.search(text, begin + 2 * limit) for place in places)
            match = min((match for match in later if match is not None), key=lambda match: match.end(), default=None)
        if match is None or match.end() == len(text):
            break
        yield text[begin : match.end()]
        begin = match.end()
    yield text[begin:]


def places_to_cut(facts: Mapping[str, Any], pieces: Sequence[bytes]) -> tuple[re.Pattern[str], ...]:
    """Where text may be cut for the tokenizer of a tokenizer.json, whose tokens stand for ``pieces``."""
    if any(step.get("pattern") == {"Regex": SPLIT_PATTERN} for step in parts(facts["pre_tokenizer"])):
        return OWN_CUTS
    if is_byte_level(facts) and not facts["normalizer"] and facts["model"].get("merges") == []:
        return _ANYWHERE
    texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
    return tuple(place for place, across in _FOREIGN_CUTS if not any(across.search(text) for text in texts))


def too_long(text: str, places: Sequence[re.Pattern[str]]) -> int:
    """Characters of the first stretch of ``text`` without one of ``places`` that is longer than LONGEST_PART; 0: there
    is none."""
    if len(text) <= LONGEST_PART:
        return 0
    return next((len(part) for part in cut(text, PIECE_CHARS, places) if len(part) > LONGEST_PART), 0)


def to_learn(text: str) -> Iterator[str]:
    """``text`` in parts for the training of a BPE: bounded in size, and cut in stretches of letters too long to be
    words."""
    for part in cut(text, PIECE_CHARS, OWN_CUTS):
        begin = 0
        for match in _LEARNED_AT_ONCE.finditer(part):
            yield part[begin : match.end()]
            begin = match.end()
        yield part[begin:]


def learnable(texts: Iterable[str]) -> float:
    """The share of ``texts`` on which a BPE can be trained in bounded memory: 1, or how far they were read."""
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
    """``share`` of ``texts``: short ones whole or not at all, the beginning of every ``_STRETCH`` of long ones."""
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
    """Where to cut ``text`` (two characters or more) at ``at`` or not far before it: behind a line end, else before a
    blank, so that its parts have the ids of the whole; else there."""
    at = min(max(at, 1), len(text) - 1)
    near = max(0, at - _LOOKED_BACK)
    for place in (_LINE_END, OWN_CUTS[0], _BLANK):
        ends = [match.end() for match in place.finditer(text, near, at + 1) if 0 < match.end() <= at]
        if ends:
            return ends[-1]
    return at


def batches(
    texts: Iterable[str], split: Callable[[str], Iterable[str]]
) -> Iterator[tuple[Sequence[str], Sequence[bool]]]:
    """Groups of the parts that ``split`` makes, for one call of the library, with the mark of each part that ends its
    text."""
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

"""Made-up text of any size: sentences over a vocabulary whose frequencies fall as in natural text (Zipf's law)."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

_WORDS, _SENTENCES = 200_000, 100_000
_BAD = (
    b'{"text": "cut off\n',
    b'{"body": "another field"}\n',
    b'{"text": "\xff\xfe"}\n',
    b"[1, 2]\n",
    b'{"text": null}\n',
)


def write_lines(path: Path, size: int, *, bad: float = 0.0, seed: int = 0) -> None:
    """A file of JSON lines of ``size`` bytes, about; ``bad`` is the share of lines that are no document."""
    rng = random.Random(seed)
    starts, vowels = (
        [*"bcdfghjklmnprstvwz", "st", "tr", "sh", "ch"],
        [*"aeiou", "ai", "ea", "ou", "er", "an", "in", "on"],
    )
    syllables = [start + vowel for start in starts for vowel in vowels]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 3, 4)))) for _ in range(_WORDS)]
    shares = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(_WORDS)))

    def sentence() -> str:
        return " ".join(rng.choices(words, cum_weights=shares, k=rng.randint(4, 25))).capitalize() + rng.choice(
            (". ", ". ", "? ", "! ")
        )

    sentences = [sentence() for _ in range(_SENTENCES)]
    written = number = 0
    with path.open("wb") as file:
        while written < size:
            number += 1
            text = f"{number}. " + "".join(rng.choices(sentences, k=rng.randint(2, 40)))
            line = rng.choice(_BAD) if rng.random() < bad else json.dumps({"text": text}).encode() + b"\n"
            written += file.write(line)

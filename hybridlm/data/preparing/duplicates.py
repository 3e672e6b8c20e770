"""Documents whose exact text occurred before, found with memory that does not grow with the corpus.

Every unit writes the digests of its documents; these are compared bucket by bucket, where a digest's first bytes choose
the bucket, so that equal ones meet. The duplicates of a unit are marked in a file next to it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from hybridlm.data.reading.documents import Document, Unit
from hybridlm.files.durable import replaced

_BUCKET = 8_000_000  # documents compared at once, about: 24 bytes each, and as much again for sorting
_RECORD = np.dtype([("digest", "V16"), ("unit", "<u4"), ("number", "<u4")])


def write_digests(folder: Path, number: int, unit: Unit, progress: Callable[[int], None] = lambda n: None) -> None:
    """The first 16 bytes of the SHA-256 of each document of a unit, unless they are written already."""
    path = _digests(folder, number)
    if path.exists():
        return
    # Synced: a name without its content would pass for a finished unit.
    with replaced(path) as partial, partial.open("wb") as file:
        for document in unit.documents():
            if isinstance(document, Document):
                file.write(document.digest[:16])
                progress(document.size)


def dropped_of(folder: Path, number: int) -> np.ndarray:
    """Which documents of a unit occurred before in the corpus: (documents,) bool. Needs ``mark_duplicates``."""
    return np.fromfile(_dropped(folder, number), dtype=np.bool_)


def mark_duplicates(folder: Path, units: int, bucket: int = _BUCKET) -> None:
    """Of equal documents in units [0, units) all but the first are marked. OSError: the folder cannot be written."""
    counts = [_digests(folder, number).stat().st_size // 16 for number in range(units)]
    buckets = -(-sum(counts) // bucket)
    for number, count in enumerate(counts):
        np.zeros(count, dtype=np.bool_).tofile(_dropped(folder, number))
    for chosen in range(buckets):
        _mark(folder, np.concatenate([_bucket(folder, number, chosen, buckets) for number in range(units)]))


def _digests(folder: Path, number: int) -> Path:
    return folder / f"unit-{number:06d}.digests"


def _dropped(folder: Path, number: int) -> Path:
    return folder / f"unit-{number:06d}.dropped"


def _bucket(folder: Path, number: int, chosen: int, buckets: int) -> np.ndarray:
    """The records of a unit that fall into one of the buckets."""
    digests = np.fromfile(_digests(folder, number), dtype="V16")
    places = np.flatnonzero(digests.view("<u8")[::2] % np.uint64(buckets) == chosen)
    records = np.empty(places.size, dtype=_RECORD)
    records["digest"], records["unit"], records["number"] = digests[places], number, places
    return records


def _mark(folder: Path, records: np.ndarray) -> None:
    """``records`` are in the order of the corpus."""
    keys = np.ascontiguousarray(records["digest"]).view("<u8").reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the first stays first
    same = np.zeros(order.size, dtype=np.bool_)
    same[1:] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    again = records[np.sort(order[same])]
    edges = np.flatnonzero(np.diff(again["unit"].astype(np.int64), prepend=-1, append=-1)).tolist()
    for begin, end in pairwise(edges):
        marks = np.memmap(_dropped(folder, int(again["unit"][begin])), dtype=np.bool_, mode="r+")
        marks[again["number"][begin:end]] = True
        marks.flush()

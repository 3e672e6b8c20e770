"""Documents whose very text came before, found with memory that does not grow with the corpus.

Every unit gives the digests of its documents; these are dealt into buckets by their first bytes, so that equal ones
meet, and each bucket is looked at by itself. What is dropped of a unit is written beside it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from hybridlm.data.reading.documents import Document
from hybridlm.data.reading.units import Unit
from hybridlm.files.durable import replaced

_BUCKET = 2_000_000  # documents of a bucket, about: 24 bytes each, and as much again for sorting
_MOST_BUCKETS = 200  # files open at once; some systems allow 256
_RECORD = np.dtype([("digest", "V16"), ("unit", "<u4"), ("number", "<u4")])


def write_digests(folder: Path, number: int, unit: Unit, progress: Callable[[int], None] = lambda n: None) -> None:
    """The first 16 bytes of the SHA-256 of each document of a unit, unless they are there already."""
    path = _digests(folder, number)
    if path.exists():
        return
    with (
        replaced(path) as partial,
        partial.open("wb") as file,
    ):  # synced: a name without its content would pass for a finished unit
        for document in unit.documents():
            if isinstance(document, Document):
                file.write(document.digest[:16])
                progress(document.size)


def dropped_of(folder: Path, number: int) -> np.ndarray:
    """Which documents of a unit came before in the corpus: (documents,) bool. ``mark_duplicates`` has run."""
    return np.fromfile(_dropped(folder, number), dtype=np.bool_)


def mark_duplicates(folder: Path, units: int, bucket: int = _BUCKET) -> None:
    """Of equal documents in units [0, units) all but the first are marked as dropped. OSError: the folder cannot be
    written."""
    counts = [_digests(folder, number).stat().st_size // 16 for number in range(units)]
    buckets = min(_MOST_BUCKETS, -(-max(1, sum(counts)) // bucket))
    for number, count in enumerate(counts):
        np.zeros(count, dtype=np.bool_).tofile(_dropped(folder, number))
    place = folder / "buckets"
    place.mkdir(exist_ok=True)
    try:
        _deal(folder, place, units, buckets)
        for path in sorted(place.iterdir()):
            _mark(folder, np.fromfile(path, dtype=_RECORD))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def remove_marks(folder: Path, units: int) -> None:
    """Remove what this module has written."""
    for number in range(units):
        for path in (_digests(folder, number), _dropped(folder, number)):
            path.unlink(missing_ok=True)


def _digests(folder: Path, number: int) -> Path:
    return folder / f"unit-{number:06d}.digests"


def _dropped(folder: Path, number: int) -> Path:
    return folder / f"unit-{number:06d}.dropped"


def _deal(folder: Path, place: Path, units: int, buckets: int) -> None:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((place / f"{bucket:03d}").open("wb")) for bucket in range(buckets)]
        for number in range(units):
            data = np.fromfile(_digests(folder, number), dtype="V16")
            records = np.empty(data.size, dtype=_RECORD)
            records["digest"], records["unit"], records["number"] = data, number, np.arange(data.size)
            which = (data.view("<u8").reshape(-1, 2)[:, 0] % np.uint64(buckets)).astype(np.uint16)
            order = np.argsort(which, kind="stable")
            ends = np.cumsum(np.bincount(which, minlength=buckets))
            for file, dealt in zip(files, np.split(records[order], ends[:-1]), strict=True):
                dealt.tofile(file)


def _mark(folder: Path, records: np.ndarray) -> None:
    """``records`` stand in the order of the corpus."""
    keys = np.ascontiguousarray(records["digest"]).view("<u8").reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the first stays first
    same = np.zeros(order.size, dtype=np.bool_)
    same[1:] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    again = records[np.sort(order[same])]
    edges = np.flatnonzero(np.diff(again["unit"].astype(np.int64), prepend=-1, append=-1)).tolist()
    for begin, end in pairwise(edges):
        path = _dropped(folder, int(again["unit"][begin]))
        marks = np.memmap(path, dtype=np.bool_, mode="r+")
        marks[again["number"][begin:end]] = True
        marks.flush()

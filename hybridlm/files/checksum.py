"""The checksum at the end of every checkpoint: one line of text behind the last byte of the file proper.

It stands in the file itself and not beside it, so that one rename makes both visible: there is no moment with a new
checkpoint and an old checksum, and a copy of a checkpoint takes its checksum along. Readers of zip files look for the
end of the archive from the back and do not mind the line. A file without it was cut short, or is none of ours: it is
not trusted. Needs no torch.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

from hybridlm.files.plain import Unreadable, open_regular

_PIECE = 2**22  # bytes read at once
_LINE = re.compile(rb"\nhybridlm sha256 ([0-9a-f]{64})\n")
SIZE = len("\nhybridlm sha256 \n") + 64  # bytes


def closing_line(digest: str) -> bytes:
    """What stands behind the bytes whose SHA-256 is ``digest`` (hexadecimal)."""
    return f"\nhybridlm sha256 {digest}\n".encode()


def has_line(path: Path) -> bool:
    """Whether the file ends in a checksum, right or wrong. Raises Unreadable."""
    with open_regular(path) as file:
        return _line(file, file.seek(0, 2)) is not None


def damage(path: Path) -> str | None:
    """What is wrong with the file as far as its checksum tells, in a few words; None: every byte is as it was
    written."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            expected = _line(file, size)
            if expected is None:
                return "no checksum at its end: cut short or damaged there"
            return None if _sha256(file, size - SIZE) == expected else "its bytes do not match their checksum"
    except Unreadable as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _line(file: BinaryIO, size: int) -> str | None:
    if size < SIZE:
        return None
    file.seek(size - SIZE)
    found = _LINE.fullmatch(file.read(SIZE))
    return found[1].decode() if found else None


def _sha256(file: BinaryIO, size: int) -> str:
    """Of the first ``size`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (piece := file.read(min(_PIECE, size))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()

"""The checksum at the end of every checkpoint: one line of text after the last byte of the archive.

It is in the file itself, so that one rename makes both visible (there is never a new checkpoint with an old checksum),
and copies keep it. Readers of zip files search for the end of the archive from the back and ignore the line. A file
without it was truncated or not written by us: it is not read. Needs no torch.
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
    """The line to append to a file whose SHA-256 is ``digest`` (hexadecimal)."""
    return f"\nhybridlm sha256 {digest}\n".encode()


def damage(path: Path) -> str | None:
    """What is wrong with the file according to its checksum, in a few words; None: every byte is as it was written."""
    try:
        with open_regular(path) as file:
            left = max(0, file.seek(0, 2) - SIZE)
            file.seek(left)
            expected = _LINE.fullmatch(file.read(SIZE))
            if expected is None:
                return "no checksum at its end: truncated, or not a checkpoint of hybridlm"
            digest = _digest(file, left)
    except Unreadable as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if digest.encode() == expected[1] else "its bytes do not match their checksum"


def _digest(file: BinaryIO, left: int) -> str:
    """SHA-256 of the first ``left`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while left > 0 and (piece := file.read(min(_PIECE, left))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()

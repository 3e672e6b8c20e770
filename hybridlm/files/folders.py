"""Folders to write in: checked before, and removed again if nothing was written. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from hybridlm.errors import UserError


def refuse_links(folder: Path) -> None:
    """UserError: a file in it is a link, a pipe or a device: appending to an untrusted run folder must not write to
    other files of the user. Folders in it may be links, for instance to a larger disk."""
    for path in folder.iterdir():
        if not path.is_dir() and (path.is_symlink() or not path.is_file()):
            raise UserError(
                f"{path}: not a regular file, a run could write elsewhere through it; remove it or replace it by a copy"
            )


def first_missing(folder: Path) -> Path | None:
    """The outermost of ``folder`` and its parents that does not exist; None: all exist."""
    return next((path for path in reversed([folder, *folder.parents]) if not path.exists()), None)


def remove_empty(folder: Path, top: Path | None) -> None:
    """Removes ``folder`` and its parents up to ``top``, as far as they are empty; None: nothing."""
    while top is not None and folder.is_relative_to(top):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent

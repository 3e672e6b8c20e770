"""Folders in which a program writes: made, looked at, and removed again where nothing came of it. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from hybridlm.errors import UserError


def refuse_links(folder: Path) -> None:
    """UserError: a file in it is a link, a pipe or a device. What is appended to a stranger's run must not end up in
    another file of the user's. A folder in it may be a link, as one to a larger disk."""
    for path in folder.iterdir():
        if not path.is_dir() and (path.is_symlink() or not path.is_file()):
            raise UserError(
                f"{path}: a link or no regular file, through which a run would write elsewhere; remove it or put a copy"
                " there"
            )


def first_missing(folder: Path) -> Path | None:
    """The outermost of ``folder`` and its parents that is not there; None: all are."""
    return next((path for path in reversed([folder, *folder.parents]) if not path.exists()), None)


def remove_empty(folder: Path, top: Path | None) -> None:
    """Removes ``folder`` and its parents up to ``top``, as far as nothing lies in them; None: nothing."""
    while top is not None and folder.is_relative_to(top):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent

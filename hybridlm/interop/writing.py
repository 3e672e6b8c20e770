"""Folders and files that export and import write."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hybridlm.errors import UserError
from hybridlm.files.folders import first_missing, remove_empty


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_inside(target: Path, run: Path) -> None:
    """UserError: ``target`` is in the folder of a run, where it would be taken for a part of it, or for the newest
    run."""
    if Path(os.path.realpath(run)) in Path(os.path.realpath(target)).parents:
        raise UserError(f"{target}: inside the run {run}; choose another place")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A file to write, which gets the name ``target`` where the block ends without an error; otherwise nothing is left.
    UserError: it is there already, or cannot be written."""
    with _beside(target, "file") as path:
        yield path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, which gets the name ``target`` where the block ends without an error; otherwise nothing is
    left. UserError: it is there already, or cannot be written."""
    with _beside(target, "folder") as folder:
        folder.mkdir()
        yield folder


@contextmanager
def _beside(target: Path, what: str) -> Iterator[Path]:
    top = None
    try:
        if target.exists() or target.is_symlink():
            raise UserError(f"{target}: exists already; choose another {what}")
        top = first_missing(target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
            path = Path(partial, what)
            yield path
            path.rename(target)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
        raise UserError(f"{target}: cannot be written ({reason}); choose another {what}") from None
    finally:
        remove_empty(target.parent, top)

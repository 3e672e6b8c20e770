"""Folders and files that export and import write."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybridlm.errors import UserError


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A file to write, which gets the name ``target`` where the block ends without an error. UserError: it is there
    already."""
    with _beside(target, "file") as path:
        yield path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write in, which gets the name ``target`` where the block ends without an error. UserError: it is
    there already."""
    with _beside(target, "folder") as folder:
        folder.mkdir()
        yield folder


@contextmanager
def _beside(target: Path, what: str) -> Iterator[Path]:
    if target.exists():
        raise UserError(f"{target}: exists already; choose another {what}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as partial:
        path = Path(partial, what)
        yield path
        path.rename(target)

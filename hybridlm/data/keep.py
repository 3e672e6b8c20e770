"""Facts that are kept on disk because they are slow to find, and safe to lose."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from hybridlm.errors import UserError
from hybridlm.files.durable import replaced
from hybridlm.files.plain import Unreadable, read_json

_MAX_BYTES = 2**28  # facts of a corpus of a million files


def kept_json(path: Path) -> dict[str, Any]:
    """What ``keep_json`` wrote; empty if there is none, or it is damaged."""
    try:
        content = read_json(path, _MAX_BYTES)
    except Unreadable:
        return {}
    return content if isinstance(content, dict) else {}


def keep_json(path: Path, facts: dict[str, Any]) -> None:
    """Write ``facts``, whole or not at all; where nothing may be written they are found again each time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(facts))


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: others see the old content or the new one. OSError: it cannot be written."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def unwritable(folder: Path, error: OSError) -> UserError:
    """The error of prepared data for which there is no place."""
    return UserError(
        f"data cannot be written to {folder} ({error.strerror or error}); name another place with data.out or"
        " HYBRIDLM_CACHE"
    )

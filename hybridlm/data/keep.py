"""Cached facts on disk: slow to recompute, safe to lose."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from hybridlm.errors import UserError
from hybridlm.files.durable import replaced
from hybridlm.files.plain import Unreadable, read_json

_MAX_BYTES = 2**28  # facts about a corpus of a million files


def kept_json(path: Path) -> dict[str, Any]:
    """What ``keep_json`` wrote; empty if the file is missing or damaged."""
    try:
        content: Any = read_json(path, _MAX_BYTES)
        facts: dict[str, Any] = content["facts"]
        return facts if content["sha256"] == _digest(facts) else {}
    except (Unreadable, KeyError, TypeError):
        return {}


def keep_json(path: Path, facts: dict[str, Any]) -> None:
    """Write ``facts`` atomically; where nothing can be written they are recomputed next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"sha256": _digest(facts), "facts": facts}))


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cache_name(*made_from: object) -> str:
    """A file name for facts about ``made_from``, whose texts may hold the bytes of file names."""
    return hashlib.sha256("\0".join(map(str, made_from)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: readers see the old content or the new one. OSError: it cannot be written."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def unwritable(folder: Path, error: OSError) -> UserError:
    """The error for prepared data that cannot be stored."""
    return UserError(
        f"cannot write prepared data to {folder} ({error.strerror or error}); choose another folder with data.out or"
        " HYBRIDLM_CACHE"
    )

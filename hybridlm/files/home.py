"""Paths that begin with ``~``. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from hybridlm.errors import UserError


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` or ``~name`` expanded. UserError: there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no account and no HOME, as in a container
        raise UserError(
            f"{path}: ~ cannot be expanded (HOME is not set, or there is no such user); write the full path"
        ) from None

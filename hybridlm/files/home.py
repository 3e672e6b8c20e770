"""Paths that begin with ``~``. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from hybridlm.errors import UserError


def expanded(path: str | Path) -> Path:
    """``path`` with its ``~`` or ``~name`` written out. UserError: there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a user without an entry among the accounts, as in a container, and without HOME
        raise UserError(
            f"{path}: ~ stands for no folder here (HOME is not set, or there is no such user); write the path out"
        ) from None

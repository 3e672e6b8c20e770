"""The ``hybridlm`` command: its verbs in the order of --help."""

from __future__ import annotations

# isort: off
from hybridlm.commands import before, trained, laboratory  # noqa: F401  # each adds its verbs
from hybridlm.commands.app import app

# isort: on


def main() -> None:
    """The console entry."""
    app()

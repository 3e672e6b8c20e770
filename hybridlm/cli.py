"""The ``hybridlm`` command: its verbs in the order of --help."""

from __future__ import annotations

import sys

# isort: off
from hybridlm.commands import before, trained, laboratory  # noqa: F401  # each adds its verbs
from hybridlm.commands.app import app, run_app

# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """The console entry."""
    run_app(sys.argv[1:])

"""The two entry points: the ``hybridlm`` command and train.py. Everything else is imported inside them, so that Ctrl-C,
running out of memory and the like end in one line from the very start."""

from __future__ import annotations

import sys

from hybridlm.cli.user_error import reported


def main() -> None:
    """The ``hybridlm`` command."""
    with reported():
        from hybridlm.cli.verbs import run_app

        run_app(sys.argv[1:])


def train() -> None:
    """train.py."""
    with reported():
        from hybridlm.cli.start import main as train_main

        train_main()

"""The two doors: the ``hybridlm`` command and train.py. Behind each everything else is imported, so that Ctrl-C, a
machine without memory and the like are told in a line from the first moment on."""

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

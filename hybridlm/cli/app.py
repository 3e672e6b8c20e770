"""The command itself, and the arguments that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hybridlm.cli.user_error import reported
from hybridlm.errors import UserError
from hybridlm.machine.launcher import INTERRUPTED

app = typer.Typer(
    help="Train and use small hybrid language models.", add_completion=False, pretty_exceptions_enable=False
)
OVERRIDES = {"ignore_unknown_options": True}  # for verbs with overrides, which report a wrong option themselves

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="`last` (the newest run), `best` (its best validation), a run folder, or a checkpoint"
    ),
]
EMA = Annotated[bool, typer.Option("--ema", help="use the running average of the weights (callbacks=ema)")]

_USAGE_ERROR = typer.BadParameter.__mro__[1]  # what typer raises for any wrong command line; it exports no name for it


def run_app(arguments: Sequence[str]) -> None:
    """Runs the command of ``arguments``, or prints the help if there are none, and exits. A mistake that typer finds,
    such as text in place of a number, is reported in one line, like our own."""
    with reported():
        try:
            code = app(list(arguments) or ["--help"], standalone_mode=False)
            if code == INTERRUPTED:  # how typer reports Ctrl-C
                raise KeyboardInterrupt
            sys.exit(code)
        except typer.Abort as end:  # how older versions do; otherwise the end of input at a prompt
            if isinstance(end.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            sys.exit(1)
        except Exception as error:
            if not isinstance(error, _USAGE_ERROR):
                raise
            where = error.ctx.command_path if error.ctx is not None else "hybridlm"  # type: ignore[attr-defined]
            problem = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")  # type: ignore[attr-defined]
            separator = " " if problem.endswith("?") else "; "
            raise UserError(f"{problem}{separator}see `{where} --help`") from None

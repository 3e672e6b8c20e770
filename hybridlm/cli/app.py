"""The command itself, and the arguments that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hybridlm.cli.user_error import reported
from hybridlm.errors import UserError
from hybridlm.machine.signals import INTERRUPTED

app = typer.Typer(
    help="Train and use small hybrid language models.", add_completion=False, pretty_exceptions_enable=False
)
OVERRIDES = {
    "ignore_unknown_options": True
}  # context of verbs that take overrides: they say themselves which option is wrong

Run = Annotated[str, typer.Argument(metavar="RUN", help="`last` (the newest run), a run folder, or a checkpoint")]
EMA = Annotated[bool, typer.Option("--ema", help="with the running average of the weights (callbacks=ema)")]

_USAGE_ERROR = typer.BadParameter.__mro__[
    1
]  # what typer raises of any mistake on the command line; it gives it no name of its own


def run_app(arguments: Sequence[str]) -> None:
    """Ends the process as ``arguments`` say, or with the help where there are none. A mistake that typer finds, such as
    a word in the place of a number, is told as ours are: in one line."""
    with reported():
        try:
            code = app(list(arguments) or ["--help"], standalone_mode=False)
            if code == INTERRUPTED:  # what typer makes of Ctrl-C
                raise KeyboardInterrupt
            sys.exit(code)
        except typer.Abort as end:  # what older ones make of it; else no more input where some was asked for
            if isinstance(end.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            sys.exit(1)
        except Exception as error:
            if not isinstance(error, _USAGE_ERROR):
                raise
            where = error.ctx.command_path if error.ctx is not None else "hybridlm"  # type: ignore[attr-defined]
            said = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
            raise UserError(f"{said}{' ' if said.endswith('?') else '; '}`{where} --help` says what is legal") from None

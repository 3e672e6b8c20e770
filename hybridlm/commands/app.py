"""The command itself, and the arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Train and use small hybrid language models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
OVERRIDES = {"ignore_unknown_options": True}  # context of verbs that take overrides: they say themselves which option is wrong

Run = Annotated[str, typer.Argument(metavar="RUN", help="`last` (the newest run), a run folder, or a checkpoint")]
EMA = Annotated[bool, typer.Option("--ema", help="with the running average of the weights (callbacks=ema)")]

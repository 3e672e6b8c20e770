"""Verbs on a configuration: train, plan, check, prepare."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hybridlm.cli.app import OVERRIDES, app
from hybridlm.cli.arguments import overrides_of
from hybridlm.cli.user_error import reported
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig

_Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[GROUP=OPTION | FIELD=VALUE]...",
        help="as for train.py, whose --help lists them: model=mamba2 size=d12 hardware=rtx4060 data.path=... ...",
    ),
]
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train: the same arguments as train.py (group=option field=value ... [-m] [--cfg job] [--help])."""
    from hybridlm.cli.start import main as train_main

    train_main(list(context.args), ("train",))


@app.command(context_settings=OVERRIDES)
def plan(
    overrides: _Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Plan a run: memory by part, the largest micro-batch that fits, tokens per second; and what generating needs.

    For the card of the hardware profile, on any machine; reads no data and initialises no weights. Exit code 2: it does
    not fit.
    """
    with reported():
        config = _new_run("plan", overrides_of("plan", overrides))
        from hybridlm.interop.reach import destinations
        from hybridlm.memory.plan import plan_inference, plan_run
        from hybridlm.memory.report import full_text, json_text, refusal
        from hybridlm.memory.suggest import suggestions

        found, inference = plan_run(config), plan_inference(config)
        changes = [] if found.fits else suggestions(config, found)
        if as_json:
            print(json_text(found, inference, changes), flush=True)
        else:
            reach = destinations(config.model, advised=True)
            print(f"{full_text(found, inference)}\nexports     {reach}", flush=True)
        if not found.fits:
            raise ConfigError(refusal(found, changes))


@app.command(context_settings=OVERRIDES)
def check(
    overrides: _Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line per row")] = False,
) -> None:
    """Verify a configuration: causality, decode, padding, documents, gradients, initial weights, parameters, state
    bytes, FLOPs.

    Runs each distinct layer of the model on the CPU, in float64, in well under a minute, whatever hardware the
    configuration names. Writes nothing. Exit code 0: every check passes; 1: one fails; 2: the input is wrong.
    """
    with reported():
        given = overrides_of("check", overrides)
        from hybridlm.config.constraints import unused_section_warnings

        config = _new_run("check", given)
        for line in filter(None, [*unused_section_warnings(config, given), config.sweep.matched]):
            print(line, file=sys.stderr)
        from hybridlm.eval.gate import run_check

        passed = run_check(config, as_json=as_json)
    if not passed:
        raise typer.Exit(1)


@app.command(context_settings=OVERRIDES)
def prepare(
    overrides: _Overrides = None,
    show: Annotated[int, typer.Option("--show", min=0, help="print N training documents as coloured tokens")] = 0,
) -> None:
    """Read, split and tokenise the data of a configuration (otherwise done when training first starts)."""
    with reported("continues"):
        given = overrides_of("prepare", overrides)
        from hybridlm.cli.compose import compose_config

        config = compose_config(given)
        from rich.console import Console

        from hybridlm.data.coloured_tokens import coloured, first_documents, legend
        from hybridlm.data.preparing.prepare import prepare as prepare_data
        from hybridlm.data.synthetic.source import shown_examples
        from hybridlm.data.windows.splits import packed_documents

        prepared = prepare_data(config.data, report=lambda line: print(line, flush=True))
        tokenizer, console = prepared.tokenizer, Console()
        if config.data.packing:
            packed = packed_documents(prepared, config.data.seq_len)
            print(
                f"whole documents packed into {packed.windows:,} windows of {config.data.seq_len},"
                f" {packed.efficiency:.1%} full",
                flush=True,
            )
        for part in prepared.parts:
            for ids, learned in first_documents(part.train.stream, tokenizer.eos_id, show):
                console.print(coloured(ids.tolist(), tokenizer, learned), end="\n\n", soft_wrap=True)
        if config.data.source == "synthetic":
            for line in shown_examples(config.data, show):
                print(line, end="\n\n")
        if show and any(part.train.stream.masked for part in prepared.parts):
            console.print(legend())


def _new_run(verb: str, overrides: list[str]) -> RunConfig:
    """The configuration of these overrides. ConfigError: it resumes a run."""
    from hybridlm.cli.compose import compose_config

    config = compose_config(overrides)
    if config.ckpt is not None:
        raise ConfigError(f"ckpt = {config.ckpt!r}: {verb} is for new runs; remove ckpt")
    return config

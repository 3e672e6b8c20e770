"""The ``hybridlm`` command. Verbs import what they need when they run, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hybridlm.config.section import ConfigError
from hybridlm.user_error import reported

app = typer.Typer(
    help="Train and use small hybrid language models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_THROUGH, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train: the same arguments as train.py (group=option field=value ... [-m] [--cfg job] [--help])."""
    from hybridlm.compose import main as train_main

    train_main(list(context.args), ("train",))


@app.command()
def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="`last` (the newest run), a run folder, or a checkpoint")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="the text to continue")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="a UTF-8 file whose text is the prompt")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="new tokens per prompt")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="sample from the likeliest up to this probability")] = 0.95,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="sample from the k likeliest tokens")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the sampling")] = 0,
    ema: Annotated[bool, typer.Option("--ema", help="with the running average of the weights (callbacks=ema)")] = False,
) -> None:
    """Continue a text with a trained model."""
    with reported():
        text = _prompt(prompt, file)
        from hybridlm.generate.command import run_generate

        run_generate(run, prompt=text, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, ema=ema)


@app.command(context_settings={"ignore_unknown_options": True})
def check(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[GROUP=OPTION | FIELD=VALUE]...", help="as for train.py: model=mamba2 size=d12 ...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON for each row")] = False,
) -> None:
    """Prove a configuration: causality, decode, padding, documents, gradients, initial weights, parameters, state bytes, FLOPs.

    Runs each distinct layer of the model on the CPU, in float64, in well under a minute, whatever card the configuration is for. Writes
    nothing. Exit code 0: every check passes; 1: one fails; 2: the input is wrong.
    """
    with reported():
        given = _overrides("check", overrides)
        from hybridlm.compose import compose_config
        from hybridlm.config.constraints import unused_section_warnings

        config = compose_config(given)
        if config.ckpt is not None:
            raise ConfigError(f"ckpt = {config.ckpt!r}: check draws weights of its own; leave ckpt away")
        for warning in unused_section_warnings(config, given):
            print(warning, file=sys.stderr)
        from hybridlm.eval.gate_report import run_check

        passed = run_check(config, as_json=as_json)
    if not passed:
        raise typer.Exit(1)


@app.command(context_settings={"ignore_unknown_options": True})
def prepare(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[GROUP=OPTION | FIELD=VALUE]...", help="as for train.py: data=files data.path=... ...")
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="print so many training documents as coloured tokens")] = 0,
) -> None:
    """Read, split and tokenise the data of a configuration, ready for training, which otherwise does it at its first start."""
    with reported():
        given = _overrides("prepare", overrides)
        from hybridlm.compose import compose_config

        config = compose_config(given)
        from rich.console import Console

        from hybridlm.data.preparing.prepare import prepare as prepare_data
        from hybridlm.data.show import coloured, first_documents, legend
        from hybridlm.data.windows.splits import packed_documents

        prepared = prepare_data(config.data, report=lambda line: print(line, flush=True))
        tokenizer, console = prepared.tokenizer, Console()
        if config.data.packing:
            packed = packed_documents(prepared, config.data.seq_len)
            print(
                f"whole documents packed into {packed.windows:,} windows of {config.data.seq_len}, {packed.efficiency:.1%} full", flush=True
            )
        for part in prepared.parts:
            for ids, learned in first_documents(part.train.stream, tokenizer.eos_id, show):
                console.print(coloured(ids.tolist(), tokenizer, learned), end="\n\n", soft_wrap=True)
        if show and any(part.train.stream.masked for part in prepared.parts):
            console.print(legend())


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False) -> None:
    """Say what this machine has, which compiled kernels work on it, and what to install for the others. Exit code 0 in any case."""
    from hybridlm.doctor.report import run_doctor

    run_doctor(as_json=as_json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="run folders, and folders with runs anywhere below them")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where the report goes (default: the first folder)")] = None,
) -> None:
    """Compare runs: one HTML page (report.html), its tables as Markdown (report.md), and every run as a row (report.csv)."""
    with reported():
        from hybridlm.report.command import run_report

        run_report(folders, out)


def _overrides(verb: str, overrides: list[str] | None) -> list[str]:
    """What was given, once it holds no flag of other commands."""
    given = list(overrides or [])
    if wrong := [word for word in given if word.startswith("-")]:
        options = {"check": "--json", "prepare": "--show N"}[verb]
        raise ConfigError(f"{verb}: unknown option {wrong[0]}; it takes {options}, --help and the overrides of train.py")
    return given


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigError("generate: give one of --prompt TEXT and --file PATH")
    if file is None:
        return prompt or ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file}: cannot be read as UTF-8 text ({error})") from error


def main() -> None:
    """The console entry."""
    app()

"""The ``hybridlm`` command. Verbs import what they need when they run, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridlm.config.section import ConfigError
from hybridlm.user_error import reported

if TYPE_CHECKING:
    from hybridlm.config.data import DataConfig
    from hybridlm.config.run import RunConfig

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


@app.command("eval", context_settings={"ignore_unknown_options": True})
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="`last` (the newest run), a run folder, or a checkpoint")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[DATA OVERRIDE]...", help="other text: data=files data.path=...; in the run's tokens")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="val or train: which documents of the data")] = "val",
    loss: Annotated[bool, typer.Option("--loss/--no-loss", help="loss, perplexity, bits per byte and loss by position")] = True,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="tasks of lm-evaluation-harness, apart by commas: hellaswag,arc_easy")
    ] = None,
    include_path: Annotated[Path | None, typer.Option("--include-path", help="a folder of tasks of your own (YAML)")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="examples in front of each; default: the task's")] = None,
    probes: Annotated[bool, typer.Option("--probes", help="what the model does with its context: induction, copying, a pass key")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="documents, and examples of each task, at most")] = None,
    context: Annotated[str | None, typer.Option("--context", help="tokens of a window, one or more: 64,256; default: the run's")] = None,
    stride: Annotated[int | None, typer.Option("--stride", min=1, help="tokens from window to window; default: half a window")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="windows at a time")] = 8,
    ema: Annotated[bool, typer.Option("--ema", help="with the running average of the weights (callbacks=ema)")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the results as JSON on standard output")] = False,
) -> None:
    """Evaluate a trained model: loss on whole documents, tasks of lm-evaluation-harness, probes. Results are added to RUN/eval.json."""
    with reported():
        given = _overrides("eval", overrides)
        if split not in ("val", "train"):
            raise ConfigError(f"--split {split}: legal are val and train")
        from hybridlm.eval.command import Evaluation, run_eval

        asked = Evaluation(
            run,
            "val" if split == "val" else "train",
            loss=loss,
            tasks=_words(tasks),
            include_path=include_path,
            num_fewshot=num_fewshot,
            probes=probes,
            limit=limit,
            contexts=_numbers("--context", context, 1),
            stride=stride,
            batch=batch,
            ema=ema,
            data=_other_data(run, given) if given else None,
            overrides=tuple(given),
        )
        run_eval(asked, as_json=as_json)


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="RUN | [GROUP=OPTION | FIELD=VALUE]...", help="a trained run, or a model as for train.py")
    ] = None,
    compare: Annotated[str | None, typer.Option("--compare", help="patterns side by side, apart by commas: T,TM,MMMT")] = None,
    contexts: Annotated[str, typer.Option("--contexts", help="tokens of the prompt")] = "512,2048,8192,32768",
    batch: Annotated[str, typer.Option("--batch", help="rows at a time")] = "1",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="tokens decoded behind each prompt")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="measured turns of each model, after one that warms up")] = 3,
    budget: Annotated[float, typer.Option("--budget", min=0.001, help="seconds a turn may take; what is slower is left out")] = 30.0,
    dtype: Annotated[str, typer.Option("--dtype", help="of weights and caches: float32, bfloat16, float16")] = "float32",
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of bench.json and bench.png; default: RUN/bench, outputs/bench/")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="with the running average of the weights (callbacks=ema)")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="bench.json on standard output in place of the table")] = False,
) -> None:
    """Measure prefill, decode and memory by context and batch, of a trained run or of untrained models, in turns on this machine."""
    with reported():
        run, configs = _models(_overrides("bench", what), compare)
        from hybridlm.bench.command import Benchmark, run_bench

        asked = Benchmark(_numbers("--contexts", contexts, 1), _numbers("--batch", batch, 1), new_tokens, rounds, budget, dtype)
        run_bench(run, configs, asked, out, ema=ema, as_json=as_json)


def _models(given: list[str], compare: str | None) -> tuple[str | None, dict[str, RunConfig]]:
    """The run to measure, if one is named, and untrained configurations by name: of each pattern to compare, else of the overrides."""
    from hybridlm.command_line import merged, pieces
    from hybridlm.compose import compose_config
    from hybridlm.run_folder import find_run

    run = given[0] if given and "=" not in given[0] else None
    if run is not None and len(given) > 1:
        raise ConfigError(f"bench: {given[1]}: a run is measured as it is; compare it with other patterns by --compare")
    overrides = given if run is None else find_run(run)[0].overrides()
    patterns = [] if compare is None else [piece.strip() for piece in pieces(compare)]
    if compare is not None and not all(patterns):
        raise ConfigError(f"--compare {compare}: an empty pattern; expected such as T,TM,MMMT")
    configs = {pattern: compose_config(merged(overrides, [f"model.pattern={pattern}"])) for pattern in patterns}
    if run is None and not configs:
        config = compose_config(overrides)
        configs = {config.model.name: config}
    return run, configs


def _other_data(run: str, overrides: list[str]) -> DataConfig:
    """The data section of a run with ``overrides``; with ``data=...`` among them that group's instead. The tokens are the run's own."""
    from hybridlm.command_line import key_of, merged
    from hybridlm.compose import compose_config
    from hybridlm.run_folder import find_run

    if wrong := [line for line in overrides if key_of(line).partition(".")[0] != "data"]:
        raise ConfigError(f"eval: {wrong[0]}: only the data can be changed (data=..., data.FIELD=...)")
    folder, _ = find_run(run)
    anew = any(key_of(line) == "data" for line in overrides)
    if not anew and not folder.recorded_overrides.is_file():
        raise ConfigError(f"{folder.recorded_overrides} is missing: name the data anew with data=... and its fields")
    recorded = [] if anew else [line for line in folder.overrides() if not key_of(line).startswith("data.tokenizer")]
    own = ["data.tokenizer.kind=file", f"data.tokenizer.path={folder.tokenizer.absolute()}"]
    return compose_config(merged([*recorded, *own], overrides)).data


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


def _overrides(verb: str, overrides: list[str] | None) -> list[str]:
    """What was given, once it holds no flag of other commands."""
    given = list(overrides or [])
    if wrong := [word for word in given if word.startswith("-")]:
        options = {"check": "--json", "prepare": "--show N"}.get(verb, "the options that --help lists")
        raise ConfigError(f"{verb}: unknown option {wrong[0]}; it takes {options}, --help and the overrides of train.py")
    return given


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word for word in (text or "").replace(",", " ").split())


def _numbers(option: str, text: str | None, least: int) -> tuple[int, ...]:
    """A list such as 512,2048. ConfigError: something in it is no whole number of at least ``least``."""
    words = (text or "").split(",") if text is not None else []
    wrong = [word for word in words if not word.strip().isdecimal() or int(word) < least]
    if wrong:
        raise ConfigError(f"{option} {text}: {wrong[0].strip()!r} is no whole number of at least {least}; expected such as 512,2048")
    return tuple(int(word) for word in words)


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

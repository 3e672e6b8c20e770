"""Verbs on a trained run: let it write, talk to it, evaluate and measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli.app import EMA, OVERRIDES, Run, app
from hybridlm.cli.arguments import models, numbers, other_data, overrides_of, words
from hybridlm.cli.user_error import reported
from hybridlm.errors import UserError

_Tokens = Annotated[int, typer.Option("--tokens", "-n", help="new tokens, at most")]
_Temperature = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token")]
_TopK = Annotated[int | None, typer.Option("--top-k", help="sample from the k likeliest tokens")]
_TopP = Annotated[float, typer.Option("--top-p", help="sample from the likeliest that hold this probability together")]
_MinP = Annotated[
    float, typer.Option("--min-p", help="sample from those at least this likely, as a share of the likeliest")
]
_Repetition = Annotated[
    float, typer.Option("--repetition-penalty", help="of tokens that occurred; more than 1 makes them less likely")
]
_Presence = Annotated[
    float, typer.Option("--presence-penalty", help="taken off the logit of every token that was generated")
]
_Frequency = Annotated[float, typer.Option("--frequency-penalty", help="the same, as often as it was generated")]
_Bias = Annotated[
    list[str] | None, typer.Option("--logit-bias", metavar="ID=X", help="added to a token's logit; may be repeated")
]
_Seed = Annotated[int, typer.Option("--seed", help="of the sampling")]
Context = Annotated[int | None, typer.Option("--context", help="the most tokens that a text may hold")]


@app.command()
def generate(
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="a text to continue; may be repeated")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="a UTF-8 file whose text is the prompt")] = None,
    tokens: _Tokens = 200,
    n_samples: Annotated[int, typer.Option("--n-samples", help="texts for each prompt; sample i has the seed + i")] = 1,
    temperature: _Temperature = 0.8,
    top_k: _TopK = None,
    top_p: _TopP = 0.95,
    min_p: _MinP = 0.0,
    repetition_penalty: _Repetition = 1.0,
    presence_penalty: _Presence = 0.0,
    frequency_penalty: _Frequency = 0.0,
    logit_bias: _Bias = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="end in front of this text; may be repeated")] = None,
    seed: _Seed = 0,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="with --json: of each token, and of so many likeliest ones")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="an object on a line for each sample")] = False,
    ema: EMA = False,
    context: Context = None,
    save_state: Annotated[
        Path | None, typer.Option("--save-state", help="write what the model remembers to this file")
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option("--load-state", help="go on from such a file; a prompt is then optional")
    ] = None,
) -> None:
    """Continue a text with a trained model; without --prompt and --file, the one on standard input."""
    with reported():
        from hybridlm.generate.command import Request, run_generate
        from hybridlm.generate.sampling import Sampling, read_biases

        biases, stops = read_biases(logit_bias or ()), tuple(stop or ())
        penalties = (repetition_penalty, presence_penalty, frequency_penalty)
        sampling = Sampling(
            temperature, top_k, top_p, min_p, *penalties, biases, seed, stops, max_new_tokens=tokens, logprobs=logprobs
        )
        request = Request(run, prompt or (), file, n_samples, as_json, ema, context, save_state, load_state)
        run_generate(request, sampling)


@app.command()
def chat(
    run: Run,
    tokens: _Tokens = 200,
    temperature: _Temperature = 0.8,
    top_k: _TopK = None,
    top_p: _TopP = 0.95,
    min_p: _MinP = 0.0,
    repetition_penalty: _Repetition = 1.0,
    seed: _Seed = 0,
    ema: EMA = False,
    context: Annotated[
        int | None, typer.Option("--context", help="the most tokens to remember (default: those of training)")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="what the assistant is told first")] = None,
    load: Annotated[Path | None, typer.Option("--load", help="go on with a conversation that /save wrote")] = None,
) -> None:
    """Talk with a trained model: with its template where it was trained on conversations, else it goes on with what you
    write."""
    with reported():
        from hybridlm.generate.chat import run_chat
        from hybridlm.generate.sampling import Sampling

        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed, max_new_tokens=tokens)
        run_chat(run, sampling, ema=ema, context=context, system=system, load=load)


@app.command("eval", context_settings=OVERRIDES)
def evaluate(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA OVERRIDE]...", help="other text: data=files data.path=...; in the run's tokens"),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="val or train: which documents of the data")] = "val",
    loss: Annotated[
        bool, typer.Option("--loss/--no-loss", help="loss, perplexity, bits per byte and loss by position")
    ] = True,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="tasks of lm-evaluation-harness, apart by commas: hellaswag,arc_easy")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="a folder of tasks of your own (YAML)")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="examples in front of each; default: the task's")
    ] = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="what the model does with its context: induction, copying, a pass key")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="documents, and examples of each task, at most")
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", help="tokens of a window, one or more: 64,256; default: the run's")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="tokens from window to window; default: half a window")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="windows at a time")] = 8,
    ema: EMA = False,
    as_json: Annotated[bool, typer.Option("--json", help="the results as JSON on standard output")] = False,
) -> None:
    """Evaluate a trained model: loss on whole documents, tasks of lm-evaluation-harness, probes. Results are added to
    RUN/eval.json."""
    with reported("goes on"):
        given = overrides_of("eval", overrides)
        if split not in ("val", "train"):
            raise UserError(f"--split {split}: legal are val and train")
        from hybridlm.eval.command import Evaluation, run_eval

        asked = Evaluation(
            run,
            "val" if split == "val" else "train",
            loss=loss,
            tasks=words(tasks),
            include_path=include_path,
            num_fewshot=num_fewshot,
            probes=probes,
            limit=limit,
            contexts=numbers("--context", context, "64,256"),
            stride=stride,
            batch=batch,
            ema=ema,
            data=other_data(run, given) if given else None,
            overrides=tuple(given),
        )
        run_eval(asked, as_json=as_json)


@app.command(context_settings=OVERRIDES)
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN | [GROUP=OPTION | FIELD=VALUE]...", help="a trained run, or a model as for train.py"
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", help="patterns side by side, apart by commas: T,TM,MMMT")
    ] = None,
    contexts: Annotated[str, typer.Option("--contexts", help="tokens of the prompt")] = "512,2048,8192,32768",
    batch: Annotated[str, typer.Option("--batch", help="rows at a time")] = "1",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="tokens decoded behind each prompt")] = 32,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="measured turns of each model, after one that warms up")
    ] = 3,
    budget: Annotated[
        float, typer.Option("--budget", min=0.001, help="seconds a turn may take; what is slower is left out")
    ] = 30.0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="of weights and caches: float32, bfloat16, float16")
    ] = "float32",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder of bench.json and bench.png; default: RUN/bench, outputs/bench/"),
    ] = None,
    ema: EMA = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="bench.json on standard output in place of the table")
    ] = False,
) -> None:
    """Measure prefill, decode and memory by context and batch, of a trained run or of untrained models, in turns on
    this machine."""
    with reported("goes on"):
        run, configs = models(overrides_of("bench", what), compare)
        from hybridlm.bench.command import Benchmark, run_bench

        asked = Benchmark(
            numbers("--contexts", contexts, "512,2048"),
            numbers("--batch", batch, "1,8"),
            new_tokens,
            rounds,
            budget,
            dtype,
        )
        run_bench(run, configs, asked, out, ema=ema, as_json=as_json)

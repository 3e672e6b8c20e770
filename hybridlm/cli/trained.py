"""Verbs on a trained run: generate, chat, eval, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hybridlm.cli.app import EMA, OVERRIDES, Run, app
from hybridlm.cli.arguments import models, numbers, other_data, overrides_of, words
from hybridlm.cli.user_error import reported

_Tokens = Annotated[int, typer.Option("--tokens", "-n", help="maximum number of new tokens")]
_Temperature = Annotated[float, typer.Option("--temperature", help="0: always the most likely token")]
_TopK = Annotated[int | None, typer.Option("--top-k", help="sample from the k most likely tokens")]
_TopP = Annotated[float, typer.Option("--top-p", help="sample from the smallest set of tokens with this probability")]
_MinP = Annotated[
    float, typer.Option("--min-p", help="sample from tokens at least this likely relative to the most likely one")
]
_Repetition = Annotated[
    float, typer.Option("--repetition-penalty", help="for tokens that occurred before; above 1 makes them less likely")
]
_Presence = Annotated[
    float, typer.Option("--presence-penalty", help="subtracted from the logit of each generated token")
]
_Frequency = Annotated[float, typer.Option("--frequency-penalty", help="the same, times the number of its occurrences")]
_Bias = Annotated[
    list[str] | None, typer.Option("--logit-bias", metavar="ID=X", help="added to the logit of token ID; repeatable")
]
_Seed = Annotated[int, typer.Option("--seed", help="sampling seed")]
Context = Annotated[int | None, typer.Option("--context", min=2, help="maximum length of a text, in tokens")]


@app.command()
def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="text to continue; repeatable")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="a UTF-8 file with the prompt")] = None,
    tokens: _Tokens = 200,
    n_samples: Annotated[
        int, typer.Option("--n-samples", min=1, help="samples per prompt; the i-th uses seed + i")
    ] = 1,
    temperature: _Temperature = 0.8,
    top_k: _TopK = None,
    top_p: _TopP = 0.95,
    min_p: _MinP = 0.0,
    repetition_penalty: _Repetition = 1.0,
    presence_penalty: _Presence = 0.0,
    frequency_penalty: _Frequency = 0.0,
    logit_bias: _Bias = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="stop before this text; repeatable")] = None,
    seed: _Seed = 0,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="with --json: log-probabilities of each token and of the N most likely"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per line and sample")] = False,
    ema: EMA = False,
    context: Context = None,
    save_state: Annotated[
        Path | None, typer.Option("--save-state", help="save the model's state after the text to this file")
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option("--load-state", help="continue from a saved state; the prompt is then optional")
    ] = None,
) -> None:
    """Continue a text with a trained model. Without --prompt or --file, the prompt is read from standard input."""
    with reported():
        from hybridlm.generate.sampling import Sampling, read_biases
        from hybridlm.runs.run_folder import find_run

        biases, stops = read_biases(logit_bias or ()), tuple(stop or ())
        penalties = (repetition_penalty, presence_penalty, frequency_penalty)
        sampling = Sampling(
            temperature, top_k, top_p, min_p, *penalties, biases, seed, stops, max_new_tokens=tokens, logprobs=logprobs
        )
        find_run(run)  # before importing torch, which takes seconds, and reading a prompt from standard input
        from hybridlm.generate.command import run_generate

        run_generate(
            run,
            sampling,
            prompts=prompt or (),
            file=file,
            samples=n_samples,
            as_json=as_json,
            ema=ema,
            context=context,
            save=save_state,
            load=load_state,
        )


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
        int | None, typer.Option("--context", min=2, help="context length in tokens (default: that of training)")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    load: Annotated[Path | None, typer.Option("--load", help="continue a conversation saved with /save")] = None,
) -> None:
    """Chat with a trained model, using its chat template if it was trained on conversations; a base model continues
    your text."""
    with reported():
        from hybridlm.generate.sampling import Sampling
        from hybridlm.runs.run_folder import find_run

        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed, max_new_tokens=tokens)
        find_run(run)  # before importing torch, which takes seconds
        from hybridlm.generate.chat import run_chat

        run_chat(run, sampling, ema=ema, context=context, system=system, load=load)


@app.command("eval", context_settings=OVERRIDES)
def evaluate(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA OVERRIDE]...", help="other text, with the run's tokenizer: data=files data.path=..."
        ),
    ] = None,
    split: Annotated[Literal["val", "train"], typer.Option("--split", help="the documents to evaluate")] = "val",
    loss: Annotated[
        bool, typer.Option("--loss/--no-loss", help="loss, perplexity, bits per byte, and loss by position")
    ] = True,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="lm-evaluation-harness tasks, comma-separated: hellaswag,arc_easy")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="a folder with your own tasks (YAML; its code is run)")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="few-shot examples (default: the task's own number)")
    ] = None,
    probes: Annotated[bool, typer.Option("--probes", help="probes of context use: induction, copying")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="maximum number of documents, and of examples per task")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", help="window length in tokens, one or several: 64,256 (default: the run's)"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="tokens between window starts (default: half a window)")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="windows per batch")] = 8,
    ema: EMA = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the results as JSON")] = False,
) -> None:
    """Evaluate a trained model by loss, lm-evaluation-harness tasks and probes. Results are added to RUN/eval.json."""
    with reported("continues"):
        given = overrides_of("eval", overrides)
        from hybridlm.eval.command import Evaluation, run_eval

        asked = Evaluation(
            run,
            split,
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
            metavar="RUN | [GROUP=OPTION | FIELD=VALUE]...",
            help="a trained run, or overrides of an untrained model",
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", help="patterns to compare, comma-separated: T,TM,MMMT")
    ] = None,
    contexts: Annotated[
        str, typer.Option("--contexts", help="prompt lengths in tokens, comma-separated")
    ] = "512,2048,8192,32768",
    batch: Annotated[str, typer.Option("--batch", help="batch sizes, comma-separated")] = "1",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="tokens to decode after each prompt")] = 32,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="measured rounds per model, after a warm-up round")
    ] = 3,
    budget: Annotated[
        float, typer.Option("--budget", min=0.001, help="maximum seconds per round; slower measurements are left out")
    ] = 30.0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="dtype of weights and caches")
    ] = "float32",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder for bench.json (default: RUN/bench or outputs/bench/TIME)"),
    ] = None,
    ema: EMA = False,
    as_json: Annotated[bool, typer.Option("--json", help="print bench.json instead of the table")] = False,
) -> None:
    """Measure prefill and decode speed and memory by context and batch size, of a trained run or of untrained
    models."""
    with reported("continues"):
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

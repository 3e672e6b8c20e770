"""`hybridlm generate`: continues prompts on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.errors import UserError, for_stream
from hybridlm.generate.loading import open_run, trained_length
from hybridlm.generate.sampling import Sampling
from hybridlm.runs.run_folder import find_run

if TYPE_CHECKING:
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.generate.engine import Completion, Engine, State, Step
    from hybridlm.runs.checkpoint import LoadedRun

_BETWEEN = "\n\n----------------\n\n"  # several samples, as in samples.txt


@dataclass(frozen=True)
class Request:
    """The options of the command line besides those of the sampling. samples: for each prompt."""

    run: str
    prompts: Sequence[str]
    file: Path | None
    samples: int = 1
    as_json: bool = False
    ema: bool = False
    context: int | None = None
    save_state: Path | None = None
    load_state: Path | None = None


def run_generate(request: Request, sampling: Sampling) -> None:
    """Continues the prompts on standard output: token by token if there is one text, text by text if there are several.

    UserError: a prompt that is empty or too long, a run or state that cannot be loaded, options that do not go
    together.
    """
    find_run(request.run)  # before reading a prompt from standard input
    prompts = _prompts(request)
    _check(request, sampling, prompts)
    run, engine = open_run(request.run, ema=request.ema, context=request.context)
    sampling = replace(sampling, stop_ids=(*sampling.stop_ids, run.tokenizer.eos_id))
    rows = [prompt for prompt in prompts for _ in range(request.samples)]
    steps, state = _steps(run, engine, request, sampling, rows)
    if len(rows) == 1 and not request.as_json:
        first = next(steps)  # a mistake in the request is reported before anything is printed
        sys.stdout.write(for_stream(rows[0], sys.stdout))
        for step in chain([first], steps):
            sys.stdout.write(for_stream(step.text, sys.stdout))
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        _print_all(steps, rows, request, sampling, run.tokenizer)
    sys.stdout.flush()
    if request.save_state is not None and state is not None:
        from hybridlm.generate.state_file import save_state

        save_state(request.save_state, state, run.model)


def _prompts(request: Request) -> list[str]:
    """The texts to continue; a saved state needs none."""
    if request.prompts and request.file is not None:
        raise UserError("generate: give --prompt TEXT or --file PATH, not both")
    if request.prompts:
        source, prompts = "--prompt", [text.encode(errors="surrogateescape") for text in request.prompts]
    elif request.file is not None:
        source = f"--file {request.file}"
        try:
            prompts = [request.file.read_bytes()]
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror})") from None
    elif request.load_state is not None:
        return [""]
    elif sys.stdin.isatty():
        raise UserError("generate: no prompt; give --prompt TEXT, --file PATH, or a text on standard input")
    else:
        source, prompts = "standard input", [sys.stdin.buffer.read()]
    if not all(prompts):
        raise UserError(f"{source}: empty; a prompt needs at least one character")
    try:
        return [prompt.decode("utf-8") for prompt in prompts]
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text (byte {error.start})") from None


def _check(request: Request, sampling: Sampling, prompts: Sequence[str]) -> None:
    """UserError: options that do not go together."""
    texts, target = len(prompts) * request.samples, request.save_state
    if sampling.logprobs is not None and not request.as_json:
        raise UserError("--logprobs: only has an effect with --json")
    if request.load_state is not None and len(prompts) > 1:
        raise UserError(f"--load-state: takes one prompt, not {len(prompts)}")
    if target is not None and texts > 1:
        raise UserError(f"--save-state: saves one text, not {texts}")
    if target is not None and (target.is_dir() or not target.absolute().parent.is_dir()):
        raise UserError(f"--save-state {target}: expected a file name in an existing folder")


def _steps(
    run: LoadedRun, engine: Engine, request: Request, sampling: Sampling, rows: Sequence[str]
) -> tuple[Iterator[Step], State | None]:
    """The tokens of every row, and the state after them if there is one to save."""
    from hybridlm.generate.engine import ROOM_AHEAD
    from hybridlm.generate.state_file import load_state

    ids = [run.tokenizer.encode(row) for row in rows]
    if request.load_state is None and request.save_state is None:
        _note_length(run, engine, max(map(len, ids)) + sampling.max_new_tokens)
        return engine.stream(ids, sampling), None
    if request.load_state is None:
        state = engine.prefill(ids, len(ids[0]) + min(sampling.max_new_tokens, ROOM_AHEAD))
    else:
        state, _ = load_state(request.load_state, run.model)
        if len(state.ids) != 1:
            raise UserError(f"{request.load_state}: holds {len(state.ids)} texts; generate continues one")
        if ids[0]:
            engine.extend(state, ids[:1])
        state = state.select([0] * len(rows)) if len(rows) > 1 else state
    _note_length(run, engine, len(state.ids[0]) + sampling.max_new_tokens)
    return engine.run(state, [replace(sampling, seed=sampling.seed + row) for row in range(len(rows))]), state


def _note_length(run: LoadedRun, engine: Engine, longest: int) -> None:
    """A text longer than the training windows is allowed, since some layers extrapolate well, but may explain poor
    results."""
    trained = trained_length(run.folder)
    if trained is not None and min(longest, engine.context or longest) > trained:
        print(f"note: up to {longest:,} tokens; the model was trained on windows of {trained:,}", file=sys.stderr)


def _print_all(
    steps: Iterator[Step], rows: Sequence[str], request: Request, sampling: Sampling, tokenizer: Tokenizer
) -> None:
    """Prints each row once it and those before it are complete."""
    from hybridlm.generate.engine import completion

    open_rows: dict[int, list[Step]] = {row: [] for row in range(len(rows))}
    printed = 0
    for step in steps:
        open_rows[step.row].append(step)
        while printed < len(rows) and open_rows[printed] and open_rows[printed][-1].finish is not None:
            done = completion(open_rows.pop(printed), sampling)
            if request.as_json:
                sample = {"prompt": rows[printed], "sample": printed % request.samples, "seed": sampling.seed + printed}
                # An encoding that cannot print a character would replace it, which changes the text.
                ascii_only = sys.stdout.isatty() or not sys.stdout.encoding.lower().startswith("utf")
                line = json.dumps(sample | _as_json(done, tokenizer), ensure_ascii=ascii_only)
                sys.stdout.write(line.replace("\x7f", "\\u007f") + "\n")
            else:
                text = rows[printed] + done.text
                sys.stdout.write((_BETWEEN if printed else "") + for_stream(text, sys.stdout))
            sys.stdout.flush()
            printed += 1
    if not request.as_json:
        sys.stdout.write("\n")


def _as_json(done: Completion, tokenizer: Tokenizer) -> dict[str, object]:
    fields: dict[str, object] = {"text": done.text, "ids": done.ids, "finish": done.finish}
    if done.logprobs is not None:
        fields["logprobs"] = [
            {
                "id": one.id,
                "token": tokenizer.decode([one.id]),
                "logprob": one.logprob,
                "top": [
                    {"id": token, "token": tokenizer.decode([token]), "logprob": value} for token, value in one.top
                ],
            }
            for one in done.logprobs
        ]
    return fields

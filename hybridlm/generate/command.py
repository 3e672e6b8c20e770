"""`hybridlm generate`: continues prompts on standard output."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError, for_stream
from hybridlm.generate.engine import ROOM_AHEAD, Completion, Engine, State, completion
from hybridlm.generate.loading import open_run, trained_length
from hybridlm.generate.row import Step
from hybridlm.generate.sampling import Sampling
from hybridlm.generate.state_file import load_state, save_state
from hybridlm.runs.checkpoint import LoadedRun

_BETWEEN = "\n\n----------------\n\n"  # several samples, as in samples.txt


def run_generate(
    name: str,
    sampling: Sampling,
    *,
    prompts: Sequence[str] = (),
    file: Path | None = None,
    samples: int = 1,
    as_json: bool = False,
    ema: bool = False,
    context: int | None = None,
    save: Path | None = None,
    load: Path | None = None,
) -> None:
    """Continues each prompt ``samples`` times on standard output: token by token if there is one text, text by text if
    there are several. load: the saved state to continue; save: where to save the state after the text.

    UserError: a prompt that is empty or too long, a run or state that cannot be loaded, options that do not go
    together.
    """
    rows = [prompt for prompt in _prompts(prompts, file, optional=load is not None) for _ in range(samples)]
    if sampling.logprobs is not None and not as_json:
        raise UserError("--logprobs: only has an effect with --json")
    if load is not None and len(prompts) > 1:
        raise UserError(f"--load-state: takes one prompt, not {len(prompts)}")
    if save is not None and len(rows) > 1:
        raise UserError(f"--save-state: saves one text, not {len(rows)}")
    if save is not None and (save.is_dir() or not save.absolute().parent.is_dir()):
        raise UserError(f"--save-state {save}: expected a file name in an existing folder")
    run, engine = open_run(name, ema=ema, context=context)
    sampling = replace(sampling, stop_ids=(*sampling.stop_ids, run.tokenizer.eos_id))
    steps, state = _steps(run, engine, rows, sampling, load, keep=save is not None)
    if len(rows) > 1 or as_json:
        _print_all(steps, rows, samples, sampling, run.tokenizer if as_json else None)
    else:
        first = next(steps)  # a mistake in the request is reported before anything is printed
        print(for_stream(rows[0], sys.stdout) + for_stream(first.text, sys.stdout), end="", flush=True)
        for step in steps:
            print(for_stream(step.text, sys.stdout), end="", flush=True)
        print(flush=True)
    if save is not None and state is not None:
        save_state(save, state, run.model)


def _prompts(prompts: Sequence[str], file: Path | None, optional: bool) -> list[str]:
    """The texts to continue. optional: there may be none, for a saved state."""
    if prompts and file is not None:
        raise UserError("generate: give --prompt TEXT or --file PATH, not both")
    if prompts:
        source, given = "--prompt", [text.encode(errors="surrogateescape") for text in prompts]
    elif file is not None:
        source = f"--file {file}"
        try:
            given = [file.read_bytes()]
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror})") from None
    elif optional:
        return [""]
    elif sys.stdin.isatty():
        raise UserError("generate: no prompt; give --prompt TEXT, --file PATH, or a text on standard input")
    else:
        source, given = "standard input", [sys.stdin.buffer.read()]
    if not all(given):
        raise UserError(f"{source}: empty; a prompt needs at least one character")
    try:
        return [prompt.decode("utf-8") for prompt in given]
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text (byte {error.start})") from None


def _steps(
    run: LoadedRun, engine: Engine, rows: Sequence[str], sampling: Sampling, load: Path | None, keep: bool
) -> tuple[Iterator[Step], State | None]:
    """The tokens of every row, and the state after them if one was loaded or is to be kept."""
    ids, state = [run.tokenizer.encode(row) for row in rows], None
    if load is not None:
        state, _ = load_state(load, run.model)
        if len(state.ids) != 1:
            raise UserError(f"{load}: holds {len(state.ids)} texts; generate continues one")
        if ids[0]:
            engine.extend(state, ids[:1])
        state = state.select([0] * len(rows))
    elif keep:
        state = engine.prefill(ids, len(ids[0]) + min(sampling.max_new_tokens, ROOM_AHEAD))
    longest = max(map(len, ids if state is None else state.ids)) + sampling.max_new_tokens
    trained = trained_length(run.folder)
    # A longer text is allowed, since some layers extrapolate well, but its length may explain poor results.
    if trained is not None and min(longest, engine.context or longest) > trained:
        print(f"note: up to {longest:,} tokens; the model was trained on windows of {trained:,}", file=sys.stderr)
    if state is None:
        return engine.stream(ids, sampling), None
    return engine.run(state, [replace(sampling, seed=sampling.seed + row) for row in range(len(rows))]), state


def _print_all(
    steps: Iterator[Step], rows: Sequence[str], samples: int, sampling: Sampling, tokenizer: Tokenizer | None
) -> None:
    """Prints each row once it and those before it are complete. tokenizer: for JSON; None: the texts alone."""
    # An encoding that cannot print a character would replace it, which changes the text.
    ascii_only = sys.stdout.isatty() or not sys.stdout.encoding.lower().startswith("utf")
    written: dict[int, list[Step]] = defaultdict(list)
    printed = 0
    for step in steps:
        written[step.row].append(step)
        while written[printed] and written[printed][-1].finish is not None:
            done = completion(written.pop(printed), sampling)
            if tokenizer is not None:
                sample = {"prompt": rows[printed], "sample": printed % samples, "seed": sampling.seed + printed}
                line = json.dumps(sample | _as_json(done, tokenizer), ensure_ascii=ascii_only)
                print(line.replace("\x7f", "\\u007f"), flush=True)
            else:
                text = for_stream(rows[printed] + done.text, sys.stdout)
                print((_BETWEEN if printed else "") + text, end="", flush=True)
            printed += 1
    if tokenizer is None:
        print(flush=True)


def _as_json(done: Completion, tokenizer: Tokenizer) -> dict[str, object]:
    def named(token: int, logprob: float) -> dict[str, object]:
        return {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}

    fields: dict[str, object] = {"text": done.text, "ids": done.ids, "finish": done.finish}
    if done.logprobs is None:
        return fields
    logprobs = [named(one.id, one.logprob) | {"top": [named(*other) for other in one.top]} for one in done.logprobs]
    return fields | {"logprobs": logprobs}

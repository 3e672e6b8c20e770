"""What `hybridlm generate` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.errors import UserError, for_stream
from hybridlm.generate.loading import Writer, open_run
from hybridlm.generate.sampling import Sampling

if TYPE_CHECKING:
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.generate.engine import State, Step

_BETWEEN = "\n\n----------------\n\n"  # several samples, as in samples.txt


@dataclass(frozen=True)
class Request:
    """What the command line asks for besides the sampling. ``samples`` of each prompt; the other names are those of the
    options."""

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
    """Continues the prompts on standard output: token by token where there is one text, text by text where there are
    several.

    ConfigError: a prompt that is empty or too long, a run or state that cannot be loaded, options that do not go
    together.
    """
    prompts = _prompts(request)
    _check(request, sampling, prompts)
    writer = open_run(request.run, ema=request.ema, context=request.context)
    sampling = replace(sampling, stop_ids=(*sampling.stop_ids, writer.run.tokenizer.eos_id))
    rows = [prompt for prompt in prompts for _ in range(request.samples)]
    steps, state = _steps(writer, request, sampling, rows)
    if len(rows) == 1 and not request.as_json:
        first = next(steps)  # what is wrong with the request is said before anything is written
        sys.stdout.write(for_stream(rows[0], sys.stdout))
        for step in chain([first], steps):
            sys.stdout.write(for_stream(step.text, sys.stdout))
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        _print_all(steps, rows, request, sampling, writer.run.tokenizer)
    sys.stdout.flush()
    if request.save_state is not None and state is not None:
        from hybridlm.generate.state_file import save_state

        save_state(request.save_state, state, writer.run.model)


def _prompts(request: Request) -> list[str]:
    """The texts to continue; a state may go on without one."""
    if request.prompts and request.file is not None:
        raise UserError("generate: give --prompt TEXT or --file PATH, not both")
    if request.prompts:
        where, texts = "--prompt", list(request.prompts)
    elif request.file is not None:
        where, texts = f"--file {request.file}", [_read(request.file)]
    elif request.load_state is not None:
        return [""]
    elif sys.stdin.isatty():
        raise UserError("generate: nothing to continue; give --prompt TEXT, --file PATH, or a text on standard input")
    else:
        where, texts = "standard input", [_decoded("standard input", sys.stdin.buffer.read())]
    for text in texts:
        if not text:
            raise UserError(f"{where}: empty; give at least one character to continue")
        _decoded(where, text.encode(errors="surrogateescape"))
    return texts


def _read(path: Path) -> str:
    try:
        return _decoded(f"--file {path}", path.read_bytes())
    except OSError as error:
        raise UserError(f"--file {path}: cannot be read ({error.strerror})") from None


def _decoded(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


def _check(request: Request, sampling: Sampling, prompts: Sequence[str]) -> None:
    if request.samples < 1:
        raise UserError(f"--n-samples {request.samples}: legal is 1 or more")
    if sampling.logprobs is not None and not request.as_json:
        raise UserError("--logprobs: stands in the objects of --json; give that too")
    if request.load_state is not None and len(prompts) > 1:
        raise UserError(f"--load-state: goes on with one prompt, {len(prompts)} were given")
    if request.save_state is not None and len(prompts) * request.samples > 1:
        raise UserError(f"--save-state: keeps one text, {len(prompts) * request.samples} were asked for")
    if request.save_state is not None and (
        request.save_state.is_dir() or not request.save_state.absolute().parent.is_dir()
    ):
        raise UserError(f"--save-state {request.save_state}: expected the name of a file in a folder that is there")


def _steps(
    writer: Writer, request: Request, sampling: Sampling, rows: Sequence[str]
) -> tuple[Iterator[Step], State | None]:
    """The tokens of every row, and the state behind them where there is one to keep."""
    from hybridlm.generate.engine import ROOM_AHEAD
    from hybridlm.generate.state_file import load_state

    engine = writer.engine
    ids = [writer.run.tokenizer.encode(row) for row in rows]
    if request.load_state is None and request.save_state is None:
        _note_length(writer, max(map(len, ids)), sampling)
        return engine.stream(ids, sampling), None
    if request.load_state is None:
        state = engine.prefill(ids, len(ids[0]) + min(sampling.max_new_tokens, ROOM_AHEAD))
    else:
        state, _ = load_state(request.load_state, writer.run.model)
        if len(state.ids) != 1:
            raise UserError(f"{request.load_state}: holds {len(state.ids)} texts; generate goes on with one")
        if ids[0]:
            engine.extend(state, ids[:1])
        state = state.select([0] * len(rows)) if len(rows) > 1 else state
    _note_length(writer, len(state.ids[0]), sampling)
    return engine.run(state, [replace(sampling, seed=sampling.seed + row) for row in range(len(rows))]), state


def _note_length(writer: Writer, given: int, sampling: Sampling) -> None:
    """A longer text than those of training is no mistake, since some layers carry on well, but a reason for what may
    come out."""
    longest, trained = given + sampling.max_new_tokens, writer.trained_length
    if trained is not None and longest > trained and (writer.engine.context or longest) > trained:
        print(f"note: up to {longest:,} tokens; the model was trained on {trained:,} at a time", file=sys.stderr)


def _print_all(
    steps: Iterator[Step], rows: Sequence[str], request: Request, sampling: Sampling, tokenizer: Tokenizer
) -> None:
    """Every row as soon as it and those before it are complete."""
    open_rows: dict[int, list[Step]] = {row: [] for row in range(len(rows))}
    printed = 0
    for step in steps:
        open_rows[step.row].append(step)
        while printed < len(rows) and open_rows[printed] and open_rows[printed][-1].finish is not None:
            done = open_rows.pop(printed)
            if request.as_json:
                sample = {"prompt": rows[printed], "sample": printed % request.samples, "seed": sampling.seed + printed}
                ascii_only = not sys.stdout.encoding.lower().startswith(
                    "utf"
                )  # a letter that is replaced would be another text
                line = json.dumps(
                    sample | _as_json(done, sampling, tokenizer), ensure_ascii=ascii_only or sys.stdout.isatty()
                )
                sys.stdout.write(line.replace("\x7f", "\\u007f") + "\n")
            else:
                text = rows[printed] + "".join(one.text for one in done)
                sys.stdout.write((_BETWEEN if printed else "") + for_stream(text, sys.stdout))
            sys.stdout.flush()
            printed += 1
    if not request.as_json:
        sys.stdout.write("\n")


def _as_json(steps: Sequence[Step], sampling: Sampling, tokenizer: Tokenizer) -> dict[str, object]:
    ids = [step.id for step in steps if step.id is not None]
    fields: dict[str, object] = {"text": "".join(step.text for step in steps), "ids": ids, "finish": steps[-1].finish}
    if sampling.logprobs is not None:
        fields["logprobs"] = [
            {
                "id": one.id,
                "token": tokenizer.decode([one.id]),
                "logprob": one.logprob,
                "top": [
                    {"id": token, "token": tokenizer.decode([token]), "logprob": value} for token, value in one.top
                ],
            }
            for one in (step.logprob for step in steps)
            if one is not None
        ]
    return fields

"""`hybridlm generate`: continues prompts on standard output."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.errors import UserError, for_stream
from hybridlm.generate.loading import open_run, trained_length
from hybridlm.generate.sampling import Sampling
from hybridlm.runs.run_folder import find_run

if TYPE_CHECKING:
    from hybridlm.generate.engine import Step

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
) -> None:
    """Continues each prompt ``samples`` times on standard output: token by token if there is one text, text by text if
    there are several.

    UserError: a prompt that is empty or too long, a run that cannot be loaded.
    """
    find_run(name)  # before reading a prompt from standard input
    rows = [prompt for prompt in _prompts(prompts, file) for _ in range(samples)]
    run, engine = open_run(name, ema=ema, context=context)
    ids = [run.tokenizer.encode(row) for row in rows]
    longest = max(map(len, ids)) + sampling.max_new_tokens
    trained = trained_length(run.folder)
    # A longer text is allowed, since some layers extrapolate well, but its length may explain poor results.
    if trained is not None and min(longest, context or longest) > trained:
        print(f"note: up to {longest:,} tokens; the model was trained on windows of {trained:,}", file=sys.stderr)
    steps = engine.stream(ids, replace(sampling, stop_ids=(run.tokenizer.eos_id,)))
    if len(rows) > 1 or as_json:
        _print_all(steps, rows, samples, sampling.seed, as_json)
        return
    first = next(steps)  # a mistake in the request is reported before anything is printed
    print(for_stream(rows[0] + first.text, sys.stdout), end="", flush=True)
    for step in steps:
        print(for_stream(step.text, sys.stdout), end="", flush=True)
    print(flush=True)


def _prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The texts to continue."""
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


def _print_all(steps: Iterator[Step], rows: Sequence[str], samples: int, seed: int, as_json: bool) -> None:
    """Prints each row once it and those before it are complete."""
    from hybridlm.generate.engine import completion

    # An encoding that cannot print a character would replace it, which changes the text.
    ascii_only = sys.stdout.isatty() or not sys.stdout.encoding.lower().startswith("utf")
    written: dict[int, list[Step]] = defaultdict(list)
    printed = 0
    for step in steps:
        written[step.row].append(step)
        while written[printed] and written[printed][-1].finish is not None:
            done = completion(written.pop(printed))
            if as_json:
                sample = {"prompt": rows[printed], "sample": printed % samples, "seed": seed + printed}
                fields = {"text": done.text, "ids": done.ids, "finish": done.finish}
                print(json.dumps(sample | fields, ensure_ascii=ascii_only).replace("\x7f", "\\u007f"), flush=True)
            else:
                text = for_stream(rows[printed] + done.text, sys.stdout)
                print((_BETWEEN if printed else "") + text, end="", flush=True)
            printed += 1
    if not as_json:
        print(flush=True)

"""`hybridlm eval`: the requested evaluations one after the other, printed and added to the run's eval.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybridlm.config.data import DataConfig
from hybridlm.config.synthetic import shortest
from hybridlm.errors import ConfigError, UserError
from hybridlm.eval.results import Record, add_records, log_to_wandb, read_records
from hybridlm.runs.resume import recorded
from hybridlm.runs.run_folder import find_run

if TYPE_CHECKING:
    from hybridlm.data.corpus import Prepared
    from hybridlm.eval.text_loss import TextLoss
    from hybridlm.runs.checkpoint import LoadedRun

_TEXT = ("source", "path", "val_path", "hf", "parts", "text_field")  # fields of data that name the text


@dataclass(frozen=True)
class Evaluation:
    """What `hybridlm eval` was asked for. contexts: tokens of a window, empty: as in the run's validation; stride:
    tokens from window to window, None: half of it; limit: the most documents, and the most examples of each task; data:
    text other than the run's own; overrides: how it was named."""

    run: str
    split: Literal["val", "train"] = "val"
    loss: bool = True
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    num_fewshot: int | None = None
    probes: bool = False
    limit: int | None = None
    contexts: tuple[int, ...] = ()
    stride: int | None = None
    batch: int = 8
    ema: bool = False
    data: DataConfig | None = None
    overrides: tuple[str, ...] = ()


def run_eval(asked: Evaluation, *, as_json: bool) -> None:
    """Evaluates, prints, and writes eval.json. UserError: the run, its data, a task or an option cannot be used."""
    folder, checkpoint = find_run(asked.run)  # before importing torch, which takes seconds
    config = recorded(folder)
    data = asked.data or config.data
    contexts = asked.contexts or _contexts(data)
    _refuse(asked, data, contexts)
    if (data.source == "synthetic") != (config.data.source == "synthetic"):
        raise ConfigError(
            f"data.source = {data.source!r}: the run was trained with {config.data.source!r}; text and synthetic tasks"
            " have different tokens"
        )
    read_records(folder.evaluation)
    tasks = {}
    if asked.tasks:
        from hybridlm.eval.tasks import load_tasks  # an unknown task is found before importing torch, too

        tasks = load_tasks(asked.tasks, asked.include_path)

    from rich.console import Console

    from hybridlm.eval.report import plot_curves, print_records
    from hybridlm.machine.device import inference_device
    from hybridlm.runs.checkpoint import load_run

    loaded = load_run(str(checkpoint), inference_device(), ema=asked.ema)
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    say(f"{loaded.checkpoint}: step {loaded.step}{', running average of the weights' if asked.ema else ''}")
    records = list(_evaluated(asked, data, contexts, tasks, loaded))
    if as_json:
        print(json.dumps([record.model_dump() for record in records], indent=1))
    else:
        print_records(records, Console(highlight=False))
    add_records(folder.evaluation, records)  # if that fails, the results are on the screen
    log_to_wandb(config, folder, records, say)
    plotted = [record for record in records if record.what == "loss" and len(record.curve) > 1]
    if plotted:
        plot_curves(plotted, folder.position_plot)
    say(f"written to {folder.evaluation}" + (f" and {folder.position_plot.name}" if plotted else ""))


def _contexts(data: DataConfig) -> tuple[int, ...]:
    """The windows of the validation during training; for a synthetic task all its lengths."""
    if data.source != "synthetic":
        return (data.val_seq_len or data.seq_len,)

    from hybridlm.data.synthetic.source import validation_lengths

    return tuple(validation_lengths(data))


def _refuse(asked: Evaluation, data: DataConfig, contexts: Sequence[int]) -> None:
    """UserError: options that do not go together."""
    if not (asked.loss or asked.tasks or asked.probes):
        raise UserError("eval: nothing to do; with --no-loss, give --tasks or --probes")
    if asked.stride is not None and asked.stride > min(contexts):
        raise UserError(
            f"--stride {asked.stride}: at most the window, --context {min(contexts)}, or tokens between windows would"
            " be skipped"
        )
    if data.source == "synthetic":
        for name in ("tasks", "probes", "stride"):
            if getattr(asked, name):
                raise UserError(f"--{name}: only for text models, and data.source=synthetic has no text")
        if min(contexts) < (least := shortest(data.synthetic)):
            raise UserError(f"--context {min(contexts)}: {data.synthetic.task} needs {least} tokens or more")
    of_tasks = {"--include-path": asked.include_path, "--num-fewshot": asked.num_fewshot}
    of_loss = {"--stride": asked.stride, "text for the loss:": " ".join(asked.overrides) or None}
    for options, used, how in ((of_tasks, asked.tasks, "with --tasks"), (of_loss, asked.loss, "without --no-loss")):
        for option, value in options.items():
            if value is not None and not used:
                raise UserError(f"{option} {value}: only has an effect {how}")


def _evaluated(
    asked: Evaluation, data: DataConfig, contexts: Sequence[int], tasks: dict[str, Any], loaded: LoadedRun
) -> Iterator[Record]:
    """The records of all requested evaluations."""
    record = partial(Record, checkpoint=loaded.checkpoint.name, step=loaded.step, ema=asked.ema)
    model, tokenizer, longest = loaded.model, loaded.tokenizer, max(contexts)
    settings: dict[str, Any] = {"split": asked.split, "limit": asked.limit, "data": list(asked.overrides)}
    if asked.loss and data.source == "synthetic":
        from hybridlm.data.synthetic.source import GeneratedWindows
        from hybridlm.eval.synthetic import synthetic_metrics

        for context in contexts:
            windows = GeneratedWindows(data.synthetic, asked.split, context, 0)
            metrics = synthetic_metrics(model, windows, asked.batch, asked.limit)
            yield record(
                what=f"answers/{data.synthetic.task}", settings=settings | {"context": context}, metrics=metrics
            )
    elif asked.loss:
        prepared = _prepared(asked, data, loaded)
        for context in contexts:
            stride = asked.stride or max(1, context // 2)
            here = settings | {"context": context, "stride": stride}
            losses = _losses(asked, loaded, prepared, context, stride)
            for name, loss in losses.items() if len(losses) > 1 else ():
                yield record(what="loss", settings=here | {"part": name}, metrics=loss.metrics())
            first, *others = losses.values()
            for other in others:
                first.merge(other)
            yield record(what="loss", settings=here, metrics=first.metrics(), curve=first.curve())
    if asked.probes:
        from hybridlm.eval.probes import EXAMPLES, run_probes

        for name, curve in run_probes(model, tokenizer, longest, asked.batch).items():
            settings = {"context": longest, "rows": EXAMPLES}
            yield record(what=f"probe/{name}", settings=settings, metrics=curve[-1], curve=curve)
    if asked.tasks:
        from hybridlm.eval.tasks import run_tasks

        settings = {"context": longest, "limit": asked.limit, "fewshot": asked.num_fewshot}
        scores = run_tasks(model, tokenizer, tasks, longest, asked.batch, asked.limit, asked.num_fewshot)
        for name, metrics in scores.items():
            yield record(what=f"task/{name}", settings=settings, metrics=metrics)


def _losses(asked: Evaluation, loaded: LoadedRun, prepared: Prepared, context: int, stride: int) -> dict[str, TextLoss]:
    """By the name of each part of the data."""
    from rich.console import Console
    from rich.progress import track

    from hybridlm.eval.text_loss import Documents, text_loss

    console, found = Console(stderr=True), {}
    for part in prepared.parts:
        documents = Documents.of_split(
            part.val if asked.split == "val" else part.train, prepared.tokenizer.eos_id, asked.limit
        )
        bar = partial(
            track,
            description=f"{part.name}, {context} tokens",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        found[part.name] = text_loss(
            loaded.model,
            documents,
            prepared.tokenizer.token_bytes(),
            context,
            stride=stride,
            batch=asked.batch,
            progress=bar,
        )
    return found


def _prepared(asked: Evaluation, data: DataConfig, loaded: LoadedRun) -> Prepared:
    """The run's data, or the text that was named instead, in the run's tokens. Text other than the run's is evaluated
    as a whole, unless the command line says what is held out."""
    from hybridlm.data.preparing.prepare import prepare

    before, tokenizer = recorded(loaded.folder).data, loaded.folder.tokenizer
    other = any(getattr(data, name) != getattr(before, name) for name in _TEXT)
    whole = other and not any(line.lstrip("+").startswith("data.val_fraction") for line in asked.overrides)
    words = " ".join(asked.overrides or loaded.folder.overrides())
    try:
        prepared = prepare(data, report=lambda line: print(f"data  {line}", file=sys.stderr, flush=True), whole=whole)
    except UserError as error:
        raise UserError(
            f"{error}; the loss needs the run's data: prepare it again with `hybridlm prepare {words}`, name other text"
            " (hybridlm eval RUN data=files data.path=...), or skip the loss with --no-loss"
        ) from None
    if prepared.tokenizer.fingerprint == loaded.tokenizer.fingerprint:
        return prepared
    if asked.overrides:
        raise UserError(
            f"{words}: gives different tokens than the run's tokenizer ({tokenizer}); one trained on plain text has no"
            " tokens for conversations"
        )
    raise UserError(
        f"{tokenizer}: the run's tokenizer differs from the one its data give now; has the text changed? Use the run's"
        f" own: hybridlm eval RUN data.tokenizer.kind=file data.tokenizer.path={tokenizer}"
    )

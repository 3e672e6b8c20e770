"""What `hybridlm eval` does: the parts that were asked for, one after the other, their results on the screen and next
to the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hybridlm.config.data import DataConfig
from hybridlm.config.load import from_yaml
from hybridlm.errors import ConfigError, UserError
from hybridlm.eval.results import Record, add_records, read_records
from hybridlm.files.plain import Unreadable, read_text
from hybridlm.runs.run_folder import RunFolder, find_run

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.data.corpus import Prepared
    from hybridlm.runs.checkpoint import LoadedRun


@dataclass(frozen=True)
class Evaluation:
    """What `hybridlm eval` was asked for. contexts: tokens of a window, empty: as in the run's validation; stride:
    tokens from window to window, None: half of it; limit: documents, and examples of each task, at most; data: other
    text than the run's own; overrides: how it was named."""

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
    """Evaluates, prints, writes eval.json. ConfigError: the run, its data, a task or an option cannot be used."""
    folder, _ = find_run(asked.run)  # what is not there is said before torch is imported, which takes seconds
    config = _config(folder)
    data = asked.data or config.data
    contexts = asked.contexts or _contexts(data)
    _refuse(asked, data, contexts)
    if (data.source == "synthetic") != (config.data.source == "synthetic"):
        raise ConfigError(
            f"data.source = {data.source!r}: the run's is {config.data.source!r}; text and generated tasks share no"
            " tokens"
        )
    read_records(folder.evaluation)
    if asked.tasks:
        from hybridlm.eval.tasks import load_tasks  # and so is an unknown task

        tasks = load_tasks(asked.tasks, asked.include_path)

    from rich.console import Console

    from hybridlm.eval.remote import log_to_wandb
    from hybridlm.eval.show import plot_curves, print_records
    from hybridlm.machine.device import inference_device
    from hybridlm.runs.checkpoint import load_run

    loaded = load_run(asked.run, inference_device(), ema=asked.ema)
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    say(f"{loaded.checkpoint}: step {loaded.step}{', running average of the weights' if asked.ema else ''}")
    records: list[Record] = []
    if asked.loss:
        prepared = _prepared(asked, data, loaded)
        for context in contexts:
            records += (
                [_answers(asked, data, loaded, context)]
                if data.source == "synthetic"
                else _losses(asked, loaded, prepared, context)
            )
    if asked.probes:
        from hybridlm.eval.probes import run_probes

        found = run_probes(loaded.model, loaded.tokenizer, max(contexts), asked.batch)
        records += [
            _record(loaded, asked, f"probe/{probe.name}", probe.settings, probe.metrics, probe.curve) for probe in found
        ]
    if asked.tasks:
        from hybridlm.eval.tasks import run_tasks

        scores = run_tasks(
            loaded.model, loaded.tokenizer, tasks, max(contexts), asked.batch, asked.limit, asked.num_fewshot
        )
        settings = {"context": max(contexts), "limit": asked.limit, "fewshot": asked.num_fewshot}
        records += [_record(loaded, asked, f"task/{name}", settings, metrics) for name, metrics in scores.items()]
    if as_json:
        print(json.dumps([asdict(record) for record in records], indent=1))
    else:
        print_records(records, Console(highlight=False))
    add_records(folder.evaluation, records)  # where that fails the results are on the screen
    log_to_wandb(config, folder, records, say)
    if drawn := [record for record in records if record.what == "loss" and len(record.curve) > 1]:
        plot_curves(drawn, folder.position_plot)
    say(f"written to {folder.evaluation}" + (f" and {folder.position_plot.name}" if drawn else ""))


def _config(folder: RunFolder) -> RunConfig:
    try:
        return from_yaml(read_text(folder.config))
    except Unreadable as error:
        raise UserError(f"{folder.config}: {error}") from None


def _contexts(data: DataConfig) -> tuple[int, ...]:
    """The windows of the validation during training; of a synthetic task all its lengths."""
    if data.source != "synthetic":
        return (data.val_seq_len or data.seq_len,)
    return tuple(dict.fromkeys((data.seq_len, *data.synthetic.eval_lengths)))


def _refuse(asked: Evaluation, data: DataConfig, contexts: Sequence[int]) -> None:
    """ConfigError: options that do not fit each other."""
    if not (asked.loss or asked.tasks or asked.probes):
        raise UserError("eval: nothing to do; with --no-loss name --tasks or --probes")
    for context in contexts:
        if asked.stride is not None and asked.stride > context:
            raise UserError(
                f"--stride {asked.stride}: at most the window, --context {context}, or tokens between windows are"
                " left out"
            )
    if data.source == "synthetic" and (
        wrong := [name for name in ("tasks", "probes", "stride") if getattr(asked, name)]
    ):
        raise UserError(f"--{wrong[0]}: is for a model of text, and data.source=synthetic has none")
    if asked.include_path is not None and not asked.tasks:
        raise UserError(f"--include-path {asked.include_path}: holds tasks; name those to run with --tasks")
    if asked.num_fewshot is not None and not asked.tasks:
        raise UserError(f"--num-fewshot {asked.num_fewshot}: is of tasks; name those to run with --tasks")
    if asked.stride is not None and not asked.loss:
        raise UserError(f"--stride {asked.stride}: is of the loss, which --no-loss leaves out")
    if asked.data is not None and not asked.loss:
        raise UserError(f"{' '.join(asked.overrides)}: names text for the loss, which --no-loss leaves out")


def _prepared(asked: Evaluation, data: DataConfig, loaded: LoadedRun) -> Prepared:
    """The run's data, or the text that was named instead, in the run's tokens."""
    from hybridlm.data.preparing.prepare import prepare

    words = " ".join(asked.overrides or loaded.folder.overrides())
    try:
        prepared = prepare(
            data,
            report=lambda line: print(f"data  {line}", file=sys.stderr, flush=True),
            whole=_is_other(asked, loaded),
        )
    except UserError as error:
        hint = (
            "prepare it again with `hybridlm prepare "
            + words
            + "`, name other text (hybridlm eval RUN data=files data.path=...)"
        )
        raise UserError(
            f"{error}; the loss needs the run's data: {hint}, or leave the loss out with --no-loss"
        ) from None
    if prepared.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
        if asked.overrides:
            raise UserError(
                f"{words}: makes other tokens than the run's ({loaded.folder.tokenizer}); one on plain text has none"
                " for conversations"
            )
        raise UserError(
            f"{loaded.folder.tokenizer}: the run's tokenizer is not the one that its data give today; has the text"
            " changed? Name the run's: hybridlm eval RUN data.tokenizer.kind=file"
            f" data.tokenizer.path={loaded.folder.tokenizer}"
        )
    return prepared


def _is_other(asked: Evaluation, loaded: LoadedRun) -> bool:
    """Whether other text than the run's is evaluated: then all of it, unless the command line says what is held out."""
    if asked.data is None or any(line.lstrip("+").startswith("data.val_fraction") for line in asked.overrides):
        return False
    before = _config(loaded.folder).data
    return any(
        getattr(asked.data, name) != getattr(before, name)
        for name in ("source", "path", "val_path", "hf", "parts", "text_field")
    )


def _losses(asked: Evaluation, loaded: LoadedRun, prepared: Prepared, context: int) -> Iterator[Record]:
    """Of all parts of the data together and, where there are several, of each."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from hybridlm.eval.text_loss import Documents, TextMeter, joined

    stride = asked.stride or max(1, context // 2)
    found = {}
    for part in prepared.parts:
        documents = Documents(part.val if asked.split == "val" else part.train, prepared.tokenizer.eos_id, asked.limit)
        reached = min(
            context, 1 << (documents.longest - 1).bit_length()
        )  # no bucket of the curve beyond it holds anything
        meter = TextMeter(loaded.model, prepared.tokenizer.token_bytes(), reached)
        batches = documents.batches(context, stride, asked.batch)
        total = documents.count(context, stride, asked.batch)
        console = Console(stderr=True)
        name = f"{part.name}, {context} tokens"
        for ids, targets in track(
            batches, name, total, console=console, transient=True, disable=not console.is_terminal
        ):
            meter.add(torch.from_numpy(ids), torch.from_numpy(targets))
        found[part.name] = meter.result(len(documents))
    settings = {
        "split": asked.split,
        "context": context,
        "stride": stride,
        "limit": asked.limit,
        "data": list(asked.overrides),
    }
    whole = joined(list(found.values()))
    if len(found) > 1:
        for name, one in found.items():
            yield _record(loaded, asked, "loss", {**settings, "part": name}, one.metrics())
    curve = [{"first": one.first, "last": one.last, "loss": one.loss, "tokens": one.tokens} for one in whole.curve]
    yield _record(loaded, asked, "loss", settings, whole.metrics(), curve)


def _answers(asked: Evaluation, data: DataConfig, loaded: LoadedRun, length: int) -> Record:
    """Of a synthetic task at one length."""
    from hybridlm.config.synthetic import shortest
    from hybridlm.data.synthetic.source import GeneratedWindows
    from hybridlm.eval.answers import answered

    if length < (least := shortest(data.synthetic)):
        raise UserError(f"--context {length}: {data.synthetic.task} takes {least} tokens or more")
    windows = GeneratedWindows(data.synthetic, asked.split, length, 0)
    settings = {"split": asked.split, "context": length, "limit": asked.limit, "data": list(asked.overrides)}
    return _record(
        loaded,
        asked,
        f"answers/{data.synthetic.task}",
        settings,
        answered(loaded.model, windows, asked.batch, asked.limit),
    )


def _record(
    loaded: LoadedRun,
    asked: Evaluation,
    what: str,
    settings: dict[str, object],
    metrics: dict[str, float],
    curve: Sequence[dict[str, float]] = (),
) -> Record:
    return Record(what, loaded.checkpoint.name, loaded.step, asked.ema, settings, metrics, list(curve))

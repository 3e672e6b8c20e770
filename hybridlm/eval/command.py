"""`hybridlm eval`: the requested evaluations, printed and added to the run's eval.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from hybridlm.config.data import DataConfig
from hybridlm.config.synthetic import shortest
from hybridlm.errors import ConfigError, UserError
from hybridlm.eval.results import add_records, log_to_wandb, print_records, read_records
from hybridlm.eval.tasks import load_tasks
from hybridlm.runs.resume import recorded
from hybridlm.runs.run_folder import find_run


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
    folder, _ = find_run(asked.run)  # before importing torch, which takes seconds
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
    tasks = load_tasks(asked.tasks, asked.include_path) if asked.tasks else {}

    from hybridlm.eval.evaluations import evaluated
    from hybridlm.machine.device import inference_device
    from hybridlm.runs.checkpoint import load_run

    loaded = load_run(asked.run, inference_device(), ema=asked.ema)
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    say(f"{loaded.checkpoint}: step {loaded.step}{', running average of the weights' if asked.ema else ''}")
    records = list(evaluated(asked, data, contexts, tasks, loaded))
    if as_json:
        print(json.dumps([record.model_dump() for record in records], indent=1))
    else:
        print_records(records, Console(highlight=False))
    add_records(folder.evaluation, records)  # if that fails, the results are on the screen
    log_to_wandb(config, folder, records, say)
    say(f"written to {folder.evaluation}")


def _contexts(data: DataConfig) -> tuple[int, ...]:
    """The windows of the validation during training; for a synthetic task all its lengths."""
    if data.source != "synthetic":
        return (data.val_seq_len or data.seq_len,)

    from hybridlm.data.synthetic.source import validation_lengths

    return tuple(validation_lengths(data))


def _refuse(asked: Evaluation, data: DataConfig, contexts: Sequence[int]) -> None:
    """UserError: options that do not go together."""
    least, generated, stride = min(contexts), data.source == "synthetic", asked.stride
    of_tasks = {"--include-path": asked.include_path, "--num-fewshot": asked.num_fewshot}
    of_loss = {"--stride": stride, "text for the loss:": " ".join(asked.overrides) or None}
    without_tasks = [f"{option} {value}" for option, value in of_tasks.items() if value is not None]
    without_loss = [f"{option} {value}" for option, value in of_loss.items() if value is not None]
    of_text = [name for name in ("tasks", "probes", "stride") if getattr(asked, name)]
    rules: tuple[tuple[object, str], ...] = (
        (
            not (asked.loss or asked.tasks or asked.probes),
            "eval: nothing to do; with --no-loss, give --tasks or --probes",
        ),
        (
            stride is not None and stride > least,
            f"--stride {stride}: at most the window, --context {least}, or tokens between windows would be skipped",
        ),
        (
            generated and of_text,
            f"--{''.join(of_text[:1])}: only for text models, and data.source=synthetic has no text",
        ),
        (
            generated and least < shortest(data.synthetic),
            f"--context {least}: {data.synthetic.task} needs {shortest(data.synthetic)} tokens or more",
        ),
        (without_tasks and not asked.tasks, f"{''.join(without_tasks[:1])}: only has an effect with --tasks"),
        (without_loss and not asked.loss, f"{''.join(without_loss[:1])}: only has an effect without --no-loss"),
    )
    for wrong, problem in rules:
        if wrong:
            raise UserError(problem)

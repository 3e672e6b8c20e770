"""Results of an evaluation: kept in eval.json in the run folder (docs/evaluation.md) and in the summary of the W&B run,
shown as tables."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from hybridlm.config.problems import recorded
from hybridlm.config.run import RunConfig
from hybridlm.config.section import Section
from hybridlm.errors import UserError
from hybridlm.files.durable import replaced
from hybridlm.files.plain import Unreadable, read_json
from hybridlm.runs.run_folder import RunFolder

_SHOWN = {"loss": "loss", "ppl": "ppl", "bpb": "bits/byte", "tokens": "tokens", "documents": "docs"}
_BAR = 40  # characters of the longest bar


class Record(Section):
    """One evaluation. what: ``loss``, ``answers/TASK``, ``task/NAME`` or ``probe/NAME``; checkpoint: its file name;
    settings: everything else the metrics depend on; curve: one row of numbers per bucket or length, where there are
    any; when: UTC, ISO 8601."""

    model_config = ConfigDict(allow_inf_nan=True)

    what: str
    checkpoint: str
    step: int = Field(ge=0)
    ema: bool
    settings: dict[str, Any]
    metrics: dict[str, int | float]
    curve: list[dict[str, int | float]] = []
    when: str = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    @property
    def key(self) -> str:
        """Two records with the same key are the same measurement; the later one replaces the earlier."""
        return json.dumps([self.what, self.checkpoint, self.step, self.ema, self.settings], sort_keys=True)

    @property
    def wandb_name(self) -> str:
        """As W&B's summary names it, with the settings that commonly differ."""
        name = self.settings["split"] if self.what == "loss" else self.what
        if self.what.startswith(("loss", "answers/")):
            name += f"/context-{self.settings['context']}"
        return f"eval/{name}/ema" if self.ema else f"eval/{name}"


class EvalFile(Section):
    """The content of eval.json."""

    format_version: Literal[1]
    results: list[Record]


def read_records(path: Path) -> list[Record]:
    """What ``add_records`` wrote, empty if there is no file. UserError: the file is not a valid eval.json."""
    if not path.exists():
        return []
    try:
        return recorded(EvalFile, read_json(path), path).results
    except Unreadable as error:
        raise UserError(f"{path}: {error}; move it away") from None


def add_records(path: Path, new: Sequence[Record]) -> None:
    """Adds to the file, replacing records with the same key. UserError: see ``read_records``, or it cannot be
    written."""
    replacing = {record.key for record in new}
    kept = [record for record in read_records(path) if record.key not in replacing]
    content = EvalFile(format_version=1, results=[*kept, *new]).model_dump()  # the newest are last
    try:
        with replaced(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def log_to_wandb(config: RunConfig, folder: RunFolder, records: Sequence[Record], warn: Callable[[str], None]) -> None:
    """Adds the metrics to the summary of the run's W&B run, if it has one. A failure is one warning, never an error."""
    logger = config.logger
    if logger.name != "wandb" or not folder.wandb_id.is_file():
        return
    try:
        import wandb

        kept = folder.wandb_run() or {}
        run = wandb.init(
            id=kept.get("id"),
            project=kept.get("project", logger.project),
            entity=kept.get("entity", logger.entity),
            resume=None if logger.offline else "allow",
            mode="offline" if logger.offline else "online",
            dir=str(folder.path),
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=logger.timeout, finish_timeout=logger.timeout
            ),
        )
        for record in records:
            run.summary.update({f"{record.wandb_name}/{name}": value for name, value in record.metrics.items()})
        run.finish()
    except Exception as error:  # no package, no network, no key
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        warn(
            f"warning: W&B did not accept the results ({type(error).__name__}: {reason}); they are in"
            f" {folder.evaluation}"
        )


def print_records(records: Sequence[Record], console: Console) -> None:
    """The losses in one table, each loss by position below it, then tasks and probes."""
    losses = [record for record in records if record.what == "loss"]
    table = _table("text", "context", "stride", *_SHOWN.values())
    for record in losses:
        settings, metrics = record.settings, record.metrics
        cells = [number(metrics[name]) if name in metrics else "" for name in _SHOWN]
        text = ", ".join(settings[name] for name in ("split", "part") if name in settings)
        table.add_row(text, str(settings["context"]), str(settings["stride"]), *cells)
    others = _table("what", "metric", "value")
    others.columns[1].justify = "left"
    for record in records:
        at = f", {record.settings['context']} tokens" if record.what.startswith("answers/") else ""
        for place, (name, value) in enumerate(record.metrics.items() if record.what != "loss" else ()):
            others.add_row(record.what + at if not place else "", name, number(value))
    curves = [_curve(record) for record in losses if len(record.curve) > 1]
    for one in (table, *curves, others):
        if one.rows:
            console.print(one)


def number(value: float) -> str:
    """Counts in full, everything else with four decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _table(first: str, *numbers: str, title: str | None = None) -> Table:
    return Table(first, *(Column(name, justify="right") for name in numbers), title=title, box=SIMPLE)


def _curve(record: Record) -> Table:
    title = f"does it use its context? ({record.settings['context']} tokens)"
    table = _table("tokens before", "targets", "loss", title=title)
    table.add_column()
    most = max(row["loss"] for row in record.curve)
    for row in record.curve:
        span = f"{row['first']}" if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        table.add_row(span, f"{row['tokens']:,}", f"{row['loss']:.4f}", "#" * max(1, round(_BAR * row["loss"] / most)))
    return table

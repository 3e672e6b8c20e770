"""Weights & Biases: one run of theirs per run of ours, whatever the number of starts, and never in the way of training.

Steps are optimizer steps and every row is written once. What earlier starts left in the run folder is read back when a
run goes on: rows that a kill kept from being written are handed over again, rows that were written are not.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.errors import UserError
from hybridlm.files.durable import replaced

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.metrics import Metrics

_BLOCK, _HEADER, _WHOLE, _LAST = (
    32768,
    struct.Struct("<IHB"),
    1,
    4,
)  # of LevelDB's log format, in which W&B writes its files
_FILE_HEADER = 7  # bytes
_LONGEST = 128  # characters of a name, by W&B's rules
_AGENT = (
    "WANDB_SWEEP_ID"  # set by `wandb agent`; project, entity and id are then those it has set, whatever is asked for
)
_RUN_ID = "WANDB_RUN_ID"


def wandb_arguments(config: RunConfig, folder: RunFolder, sweep: str | None) -> dict[str, Any]:
    """What ``wandb.init`` is told of the run; one of a sweep is in its group, under the number of its job."""
    logger = config.logger
    place = folder.path.name if sweep is None else f"{sweep}/{folder.path.name}"
    return {
        "project": logger.project,
        "entity": logger.entity,
        "group": logger.group or (sweep and sweep[:_LONGEST]),
        "job_type": logger.job_type or ("train" if sweep is None else "sweep"),
        "tags": list(logger.tags),
        "name": logger.run_name or f"{config.model.name} {place}"[-_LONGEST:],
        "mode": "offline" if logger.offline else "online",
        "dir": str(folder.path),
        "config": config.model_dump(mode="json"),
    }


def refuse_bad_run_id() -> None:
    """Raise UserError where the id in the environment is one that W&B would refuse with the first row."""
    if (run_id := os.environ.get(_RUN_ID)) is None:
        return
    import wandb

    try:
        wandb.Settings(run_id=run_id)
    except (wandb.errors.UsageError, ValueError) as error:  # ValueError: pydantic's
        raise UserError(f"{_RUN_ID}={run_id}: {' '.join(str(error).split())}") from None


def _run_id(kept: Mapping[str, str | None] | None) -> str:
    """What to ask for: the id of the run's earlier starts, where it had any, else the one in the environment."""
    asked = os.environ.get(_RUN_ID)
    if asked and _AGENT in os.environ:
        return asked
    return (kept and kept["id"]) or asked or secrets.token_hex(4)


class Wandb:
    """The backend of ``logger=wandb``."""

    def __init__(self, arguments: dict[str, Any], folder: RunFolder, *, timeout: float) -> None:
        """arguments: from ``wandb_arguments``; folder: keeps id, project and entity of the run from start to start;
        timeout: in seconds, see LoggerConfig."""
        self.arguments, self._folder, self._timeout = arguments, folder, timeout
        self._run: Any = None
        self._written = -1  # the last step that an earlier start wrote
        self._handed = -1  # the last one that W&B was handed

    def start(self, rows: Sequence[Metrics]) -> str:
        kept = self._folder.wandb_run()
        if kept is not None:  # the run goes on where it began
            self.arguments |= {name: value for name, value in kept.items() if name != "id"}
        line = self._begin(_run_id(kept))
        run_id = self._run.id  # an agent of W&B may have made it another one than was asked for, in another project
        with replaced(self._folder.wandb_id) as new:
            new.write_text(f"{run_id}\n{self._run.project}\n{self._run.entity or ''}\n", encoding="utf-8")
        self._written = self._last_row(run_id)
        self._run.define_metric("data/tokens")
        self._run.define_metric("*", step_metric="data/tokens", step_sync=True)
        for row in rows:
            self.log(
                {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)},
                int(row["step"]),
            )  # type: ignore[arg-type]
        return line or f"wandb, offline; upload with: wandb sync {self.arguments['dir']}/wandb/offline-run-*-{run_id}"

    def _last_row(self, run_id: str) -> int:
        """The last step that W&B's files have."""
        return max((step for step, _ in written_rows(Path(self.arguments["dir"]), run_id)), default=-1)

    def _begin(self, run_id: str) -> str:
        """Online as far as asked for and possible in time, else offline. Returns a line for the user, or nothing where
        it is offline."""
        import wandb

        # W&B names a start's folder by its second, and would write into that of a start within the same one.
        while any((Path(self.arguments["dir"]) / "wandb").glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
            time.sleep(0.05)
        settings = wandb.Settings(silent=True, console="off", init_timeout=self._timeout, finish_timeout=self._timeout)
        line = ""
        if self.arguments["mode"] == "online":
            try:
                self._run = wandb.init(**self.arguments, id=run_id, resume="allow", settings=settings)
                return f"wandb: {self._run.url}"
            except Exception as error:  # no network, no key, a server that does not answer
                reason = (str(error).strip().splitlines() or [""])[0][:120]
                line = f"wandb cannot be reached and goes on offline: {type(error).__name__}: {reason}"
                wandb.teardown()  # its service holds on to the id
        self._run = wandb.init(**{**self.arguments, "mode": "offline"}, id=run_id, settings=settings)
        return line

    def log(self, row: dict[str, float], step: int) -> None:
        if step > self._written:
            self._run.log(row, step=step)
            self._handed = step

    def histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        import wandb

        if step > self._written:
            self._run.log({name: wandb.Histogram(np_histogram=(list(counts), list(edges)))}, step=step)

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        import wandb

        if step > self._written:
            rows = [[step, prompt, text] for prompt, text in zip(prompts, texts, strict=True)]
            self._run.log({"samples": wandb.Table(columns=["step", "prompt", "text"], data=rows)}, step=step)

    def summary(self, facts: dict[str, Any]) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in facts.items()})

    def close(self) -> str:
        import wandb

        run_id = self._run.id
        try:
            self._run.finish()
        finally:
            # its service writes the end of the file some time after finish() has returned, and before it ends itself
            wandb.teardown()
        # W&B's service drops what it cannot write, and tells nobody.
        if (last := self._last_row(run_id)) < self._handed:
            place = Path(self.arguments["dir"]) / "wandb"
            return (
                f"wandb lacks what came behind step {max(last, 0)}, as it could not write {place}; metrics.jsonl has it"
            )
        return ""


def written_rows(folder: Path, run_id: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(step, {name: value as JSON}) of every row that the starts of the run ``run_id`` left under ``folder``/wandb,
    oldest start first."""
    for path in sorted(
        (folder / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb"),
        key=lambda path: path.parent.name.partition("run-")[2],
    ):
        if path.parent.is_symlink():  # latest-run
            continue
        for record in _records(path.read_bytes()):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield (
                    record.history.step.num,
                    {item.key or ".".join(item.nested_key): item.value_json for item in items},
                )


def _records(content: bytes) -> Iterator[Any]:
    """The records of a file; a torn end is left out."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    place, parts = _FILE_HEADER, b""
    while place + _HEADER.size <= len(content):
        if (left := _BLOCK - place % _BLOCK) < _HEADER.size:
            place += left
            continue
        _, length, kind = _HEADER.unpack_from(content, place)
        place += _HEADER.size
        if place + length > len(content):
            return
        parts += content[place : place + length]
        place += length
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(parts)
            except DecodeError:
                return
            yield record
            parts = b""

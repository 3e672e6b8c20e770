"""Weights & Biases: one W&B run per run folder, however often it is started, by W&B's own resuming.

Steps are optimizer steps. Online, W&B continues a resumed run after its last step and drops rows of earlier ones.
Offline, each start writes a segment of its own under the run's id; steps that are trained again are in two segments.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.errors import UserError
from hybridlm.files.durable import replaced

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.run_files import Row

_LONGEST = 128  # characters of a name, by W&B's rules
_RUN_ID = "WANDB_RUN_ID"
_AGENT = "WANDB_SWEEP_ID"  # set by `wandb agent`, which then decides project, entity and id, whatever is asked for


def wandb_arguments(config: RunConfig, folder: RunFolder, sweep: str | None) -> dict[str, Any]:
    """Arguments of ``wandb.init``. A run of a sweep is in the sweep's group, under the number of its job."""
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
    """UserError: W&B would refuse the id in the environment at the first row."""
    if (run_id := os.environ.get(_RUN_ID)) is None:
        return
    import wandb

    try:
        wandb.Settings(run_id=run_id)
    except (wandb.errors.UsageError, ValueError) as error:  # ValueError: pydantic's
        raise UserError(f"{_RUN_ID}={run_id}: {' '.join(str(error).split())}") from None


class Wandb:
    """The backend of ``logger=wandb``."""

    def __init__(self, arguments: dict[str, Any], folder: RunFolder, *, timeout: float) -> None:
        """arguments: from ``wandb_arguments``; folder: keeps id, project and entity of the W&B run between starts;
        timeout: in seconds, see LoggerConfig."""
        self.arguments, self._folder, self._timeout = arguments, folder, timeout
        self._run: Any = None

    def start(self, rows: Sequence[Row]) -> str:
        known, asked = self._folder.wandb_run(), os.environ.get(_RUN_ID)
        if known is not None:  # the run continues where it began
            self.arguments |= {name: value for name, value in known.items() if name != "id"}
        agents = asked if _AGENT in os.environ else None
        line = self._init(agents or (known and known["id"]) or asked or secrets.token_hex(4))
        run_id = self._run.id  # an agent may have changed it, and the project
        with replaced(self._folder.wandb_id) as new:
            new.write_text(f"{run_id}\n{self._run.project}\n{self._run.entity or ''}\n", encoding="utf-8")
        self._run.define_metric("data/tokens")
        self._run.define_metric("*", step_metric="data/tokens", step_sync=True)
        for row in rows if known is None else ():  # earlier starts had another logger
            scalars = {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)}
            self._run.log(scalars, step=row["step"])
        return line or f"wandb, offline; upload with: wandb sync {self.arguments['dir']}/wandb/offline-run-*-{run_id}"

    def _init(self, run_id: str) -> str:
        """Begins or continues the W&B run, offline if online is not asked for or not possible in time. Returns a line
        for the user, or nothing if offline was asked for."""
        import wandb

        # W&B names a start's folder by its second, and would write into that of another start within the same second.
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
                line = f"wandb cannot be reached, continuing offline: {type(error).__name__}: {reason}"
                wandb.teardown()  # its service holds on to the id
        self._run = wandb.init(**{**self.arguments, "mode": "offline"}, id=run_id, settings=settings)
        return line

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        import wandb

        rows = [[step, prompt, text] for prompt, text in zip(prompts, texts, strict=True)]
        self._run.log({"samples": wandb.Table(columns=["step", "prompt", "text"], data=rows)}, step=step)

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in summary.items()})

    def close(self) -> None:
        import wandb

        try:
            self._run.finish()
        finally:
            wandb.teardown()  # its service writes the end of the file after finish() has returned, before it exits

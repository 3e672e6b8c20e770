"""Where metrics go besides the console: always to the run folder, and to one remote logger, which may fail without
ending the run."""

from __future__ import annotations

import importlib.util
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError
from hybridlm.files.durable import replaced
from hybridlm.machine.launcher import is_first_rank
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.console import Console
from hybridlm.train.run_files import Row, RowLogger, RunFiles

_LONGEST = 128  # characters of a name, by W&B's rules
_AGENT = "WANDB_SWEEP_ID"  # set by `wandb agent`, which then decides project, entity and id, whatever is asked for


class Wandb:
    """The backend of ``logger=wandb``. A run of a sweep is in the sweep's group, under the number of its job."""

    def __init__(self, config: RunConfig, folder: RunFolder, sweep: str | None) -> None:
        """folder: keeps id, project and entity of the W&B run between starts; sweep: the sweep's name."""
        logger, self._folder, self._timeout = config.logger, folder, config.logger.timeout
        self._run: Any = None
        place = folder.path.name if sweep is None else f"{sweep}/{folder.path.name}"
        self.arguments: dict[str, Any] = {
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

    def start(self) -> str:
        """Begins or continues the W&B run, offline if online is not asked for or not possible in time."""
        import wandb

        known, asked = self._folder.wandb_run(), os.environ.get("WANDB_RUN_ID")
        if known is not None:  # the run continues where it began
            self.arguments |= {name: value for name, value in known.items() if name != "id"}
        agents = asked if _AGENT in os.environ else None
        run_id = agents or (known and known["id"]) or asked or secrets.token_hex(4)
        # W&B names a start's folder by its second, and would write into that of another start within the same second.
        while any((Path(self.arguments["dir"]) / "wandb").glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
            time.sleep(0.05)
        settings = wandb.Settings(silent=True, console="off", init_timeout=self._timeout, finish_timeout=self._timeout)
        line = f"wandb, offline; upload with: wandb sync {self.arguments['dir']}/wandb/offline-run-*-{run_id}"
        if self.arguments["mode"] == "online":
            try:
                self._run = wandb.init(**self.arguments, id=run_id, resume="allow", settings=settings)
                line = f"wandb: {self._run.url}"
            except Exception as error:  # no network, no key, a server that does not answer
                reason = (str(error).strip().splitlines() or [""])[0][:120]
                line = f"wandb cannot be reached, continuing offline: {type(error).__name__}: {reason}"
                wandb.teardown()  # its service holds on to the id
        if self._run is None:
            self._run = wandb.init(**{**self.arguments, "mode": "offline"}, id=run_id, settings=settings)
        with replaced(self._folder.wandb_id) as new:  # an agent may have changed the id, and the project
            new.write_text(f"{self._run.id}\n{self._run.project}\n{self._run.entity or ''}\n", encoding="utf-8")
        self._run.define_metric("data/tokens")
        self._run.define_metric("*", step_metric="data/tokens", step_sync=True)
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


_PACKAGES = {"wandb": "pip install wandb", "tensorboard": "pip install 'hybridlm[tensorboard]'"}


class TensorBoard:
    """TensorBoard's event files in ``folder``. A resumed run adds a file that replaces the steps after its
    checkpoint."""

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self._folder, self._resumed_at = folder, resumed_at

    def start(self) -> str:
        from torch.utils.tensorboard import SummaryWriter

        purged = None if self._resumed_at is None else self._resumed_at + 1
        self._writer: Any = SummaryWriter(str(self._folder), purge_step=purged)
        return f"tensorboard --logdir {self._folder}"

    def log(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        for i, text in enumerate(texts):
            self._writer.add_text(f"samples/{i + 1}", text, step)

    def summary(self, summary: Mapping[str, Any]) -> None:
        self._writer.add_text("summary", "\n".join(f"    {name}: {value}" for name, value in summary.items()), 0)

    def close(self) -> None:
        self._writer.close()


Backend = Wandb | TensorBoard


class Remote(RowLogger):
    """A backend as one of Lightning's loggers. What it raises is reported once, and it is not called again."""

    def __init__(self, backend: Backend | None, say: Callable[[str], None]) -> None:
        """backend: None does nothing."""
        super().__init__()
        self._backend, self._say, self._started = backend, say, False

    def _call(self, action: Callable[[Backend], None]) -> None:
        if self._backend is None:
            return
        try:
            if not self._started:  # with the first row: a run that fails before it leaves nothing behind
                self._started = True
                self._say(f"logger      {self._backend.start()}")
            action(self._backend)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:160]
            self._say(
                f"warning     the logger {type(self._backend).__name__.lower()} failed and is no longer used, "
                f"metrics.jsonl continues: {type(error).__name__}: {reason}"
            )
            failed, self._backend = self._backend, None
            with suppress(Exception):  # otherwise it would fail again at the end of the process
                failed.close()

    @rank_zero_only
    def log_metrics(self, metrics: Row, step: int | None = None) -> None:
        scalars = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        self._call(lambda backend: backend.log(scalars, step or 0))

    @rank_zero_only
    def samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Text sampled after ``step``."""
        if prompts:
            self._call(lambda backend: backend.samples(step, prompts, texts))

    @rank_zero_only
    def summary(self, summary: Mapping[str, Any]) -> None:
        """What summary.json contains."""
        self._call(lambda backend: backend.summary(summary))

    @rank_zero_only
    def close(self) -> None:
        """Flushes and ends. Lightning's ``finalize`` comes before the last validation, too early for it."""
        if self._started:
            self._call(lambda backend: backend.close())
        self._backend = None


def make_loggers(
    config: RunConfig, folder: RunFolder, console: Console, *, resumed_at: int | None, sweep: str | None
) -> tuple[list[Logger], Remote]:
    """Those of a run on this rank, in the order in which they are called, and the remote one, which is the last:
    metrics.jsonl has each row before it does. sweep: the name of the sweep that the run belongs to."""
    if not is_first_rank():
        return [console], Remote(None, console.say)
    files = RunFiles(folder.metrics_jsonl, folder.metrics_csv, resume_step=resumed_at, say=console.say)
    backend: Backend | None = None
    if config.logger.name == "wandb":
        backend = Wandb(config, folder, sweep)
    elif config.logger.name == "tensorboard":
        backend = TensorBoard(folder.tensorboard, resumed_at)
    remote = Remote(backend, console.say)
    return [files, console, remote], remote


def refuse_logger(config: RunConfig, folder: RunFolder) -> None:
    """UserError: the package of ``config.logger`` is missing, or the run at W&B that it continues is unknown."""
    name = config.logger.name
    if name in _PACKAGES and importlib.util.find_spec(name) is None:
        raise ConfigError(f"logger = {name!r}: the package {name} is not installed; {_PACKAGES[name]}, or logger=files")
    if name == "wandb":
        folder.wandb_run()

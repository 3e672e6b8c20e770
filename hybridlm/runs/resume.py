"""How a run was called, and what ``ckpt=`` means: which run is resumed, from which checkpoint, with which recorded
configuration. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hybridlm.config.load import from_yaml, leaves
from hybridlm.config.model import ModelConfig
from hybridlm.config.problems import show
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.checksum import damage
from hybridlm.files.plain import Unreadable, read_text
from hybridlm.runs.run_folder import RunFolder, find_run, newest_run, run_of


@dataclass(frozen=True)
class Resume:
    """checkpoint: the one to resume from, whose checksum was verified; named: by its path, not as ``last`` or
    ``auto``."""

    checkpoint: Path
    named: bool


class NothingLeft(ConfigError):
    """The run has ended, and nothing beyond its end was asked for."""


@dataclass(frozen=True)
class Call:
    """verb: the words between the program's name and the overrides; overrides: of this start and, when it resumes, of
    the earlier ones.

    anew: may replace a run in the folder that has saved nothing; named: the checkpoint was named by its path, so that
    having nothing left to do is an error; sweep: a job of one of Hydra's sweeps; meet: called once everything that can
    be refused is checked and the folder is the run's own, returns when the other processes are ready.
    """

    verb: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    anew: bool = False
    named: bool = True
    sweep: bool = False
    meet: Callable[[], None] = lambda: None

    @property
    def program(self) -> str:
        """What a user types to start it."""
        return f"hybridlm {' '.join(self.verb)}" if self.verb else "python train.py"


def resumed_folder(ckpt: str | None, folder: str | None) -> RunFolder | None:
    """The folder of the run to resume according to ``ckpt`` and ``hydra.run.dir``, or None for a new run.

    UserError: there is nothing to resume; ``ckpt=auto`` starts a new run instead.
    """
    if ckpt is None or ckpt.lower() in ("null", ""):
        return None
    if ckpt in ("last", "auto"):
        found = RunFolder(Path(folder).absolute()) if folder else newest_run(Path.cwd())
        if ckpt == "auto":
            return found if found is not None and found.is_run() and found.resumable() else None
        return find_run("last")[0] if found is None else run_of(found.path)
    named, file = find_run(ckpt)
    if file is not None and file.suffix == ".safetensors":
        raise UserError(
            f"ckpt = {ckpt}: weights only, without optimizer state; start a new run from them (init_from={ckpt}), or"
            " resume from a run folder with checkpoints"
        )
    if folder and Path(folder).absolute().resolve() != named.path.resolve():
        raise UserError(
            f"ckpt={ckpt} is in {named.path}, but hydra.run.dir={folder}; a run is resumed in its own folder"
        )
    return named


def checkpoint_to_resume(ckpt: str, folder: RunFolder) -> Resume:
    """Where the run in ``folder`` resumes from. To be asked while the folder is locked: a run that trains writes new
    checkpoints.

    UserError: the checkpoint is damaged. A damaged newest one is skipped, one that ``ckpt`` names is refused.
    """
    named = ckpt not in ("last", "auto")
    checkpoint = find_run(ckpt)[1] if named else None
    if checkpoint is None:
        return Resume(folder.newest_checkpoint(), named)
    if problem := damage(checkpoint):
        raise UserError(f"ckpt = {ckpt}: {problem}; ckpt=last takes the newest intact checkpoint")
    return Resume(checkpoint, named)


def requeued(folder: RunFolder) -> bool:
    """Whether this is a SLURM job that was requeued and started in ``folder`` before."""
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    return count.isdecimal() and int(count) > 0 and folder.is_run()


def recorded(folder: RunFolder, *, rules: bool = True) -> RunConfig:
    """The configuration of a run. rules: as of ``from_yaml``. A run that started from given weights reads their
    tokenizer from its own copy. UserError: its config.yaml is not a valid one."""
    try:
        config = from_yaml(read_text(folder.config), rules=rules).model_copy(update={"ckpt": None})
    except Unreadable as error:
        raise UserError(f"{folder.config}: {error}") from None
    except UserError as error:
        problems = [problem.removeprefix("config.yaml: ") for problem in error.problems]
        raise UserError([f"{folder.config}: {problem}" for problem in problems]) from error
    if config.init_from is None or config.data.tokenizer.kind != "file":
        return config
    tokenizer = config.data.tokenizer.model_copy(update={"path": str(folder.tokenizer.absolute())})
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer})})


def refuse_other_optimizer(folder: RunFolder, old: RunConfig, new: RunConfig) -> None:
    """UserError: another optimizer, which keeps other state, or another objective."""
    for field in ("name", "objective"):
        was, now = getattr(old.optim, field), getattr(new.optim, field)
        if was != now:
            raise UserError(
                f"{folder.path} cannot resume with a different optimizer or objective; optim.{field}: {show(was)} ->"
                f" {show(now)}; start a new run without ckpt"
            )


def model_changes(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Each field that differs, old -> new."""
    before, after = dict(leaves(old.model_dump())), dict(leaves(new.model_dump()))
    return [
        f"{'.'.join(('model', *path))}: {show(before.get(path))} -> {show(after.get(path))}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]

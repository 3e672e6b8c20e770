"""When a checkpoint is written and which ones stay: the last k steps, the best k validations, and the state a run stops
in."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import Checkpoint

from hybridlm.errors import RunFailed, UserError
from hybridlm.runs.checkpoint import export_weights
from hybridlm.runs.run_folder import step_of
from hybridlm.train.checkpoint_io import AtomicCheckpointIO, writer_of
from hybridlm.train.metrics import validation_score

if TYPE_CHECKING:
    from hybridlm.config.train import TrainerConfig
    from hybridlm.runs.run_folder import RunFolder
    from hybridlm.train.stopping import Stopping


@dataclass(frozen=True)
class _Outcome:
    """How a save went. failed: the files that are not there, and why; notes: what else is to be said."""

    failed: dict[Path, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Begun:
    """The save of a step, which may still be going on. last: the run ends with it; outcome: on the first rank."""

    step: int
    last: bool
    outcome: Future[_Outcome] | None


class Checkpoints(Checkpoint):
    """Saves at the end of an optimizer step, behind the validation where one is due, so that no validation is lost or
    seen twice.

    Lightning calls callbacks of this class after all others, whose state the checkpoint holds. (Its ModelCheckpoint
    saves before the validation, forgets the file that a run was resumed from, and deletes by lists that a crash leaves
    wrong: here the folder is the list.)
    """

    def __init__(
        self, folder: RunFolder, settings: TrainerConfig, stopping: Stopping, say: Callable[[str], None]
    ) -> None:
        """``say`` prints a line on the first rank."""
        self._folder, self.stopping, self._say = folder, stopping, say
        self.every, self.keep_last, self.keep_best = settings.ckpt_every, settings.keep_last, settings.keep_best
        self._val_every = settings.val_every
        self._step = 0  # the last one that was looked at
        self._best: dict[int, float] = {}  # score by step, of the best checkpoints
        self._begun: _Begun | None = None  # the save that no rank but the first has heard of since

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        validates = trainer.should_stop or (self._val_every is not None and step % self._val_every == 0)
        if step != self._step and not validates:
            self._after_step(trainer, best=False)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step != self._step:
            self._settle(trainer)  # the ranking is of the best ones that were written
            self._after_step(trainer, best=self._among_best(trainer.global_step, validation_score(trainer)))

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = {
            step: score for step, score in state_dict["best"].items() if self._folder.best_checkpoint(step).exists()
        }

    def _after_step(self, trainer: lightning.Trainer, *, best: bool) -> None:
        self._step = step = trainer.global_step
        reason = self.stopping.reason(trainer)
        last = step >= trainer.max_steps or trainer.should_stop or reason is not None
        paths = [self._folder.step_checkpoint(step)] if last or step % self.every == 0 else []
        if best:
            paths.append(self._folder.best_checkpoint(step))
        if paths:
            self._save(trainer, paths, last=last)
        if reason is not None:
            self.stopping.stop(trainer, reason)

    def _among_best(self, step: int, score: float) -> bool:
        """Whether this validation belongs to the best, in which case it takes its place: each checkpoint of this step
        then says so."""
        if not math.isfinite(score):
            return False
        ranked = sorted({**self._best, step: score}.items(), key=lambda item: (item[1], item[0]))[: self.keep_best]
        self._best = dict(ranked)
        return step in self._best

    def _save(self, trainer: lightning.Trainer, paths: list[Path], *, last: bool) -> None:
        """``paths``: the names that the checkpoint of this step is to have."""
        self._settle(trainer)
        trainer.save_checkpoint(paths[0])
        writer, kept = writer_of(trainer), frozenset(self._best)
        outcome = (
            writer.background.start(lambda: self._complete(writer, paths, kept)) if trainer.is_global_zero else None
        )
        self._begun = _Begun(self._step, last, outcome)
        if last or not writer.background.threaded:
            self._settle(trainer)

    def _complete(self, writer: AtomicCheckpointIO, paths: list[Path], kept: frozenset[int]) -> _Outcome:
        """The first rank's work once the first of ``paths`` was written, or was not. ``kept``: the steps of the best
        checkpoints."""
        first, *others = paths
        if writer.error is not None:
            return _Outcome(dict.fromkeys(paths, writer.error))
        failed: dict[Path, str] = {}
        notes: list[str] = []
        for path in others:
            writer.duplicate(first, path)
            if writer.error is not None:
                failed[path] = writer.error
        best = self._folder.best_checkpoint(step_of(first))
        if best in paths and best not in failed:
            for old in self._folder.best_checkpoints():
                if step_of(old) not in kept:
                    old.unlink(missing_ok=True)
            notes = self._export(best, self._folder.best_weights)
        if first != best:
            self._prune()
        return _Outcome(failed, notes)

    def _settle(self, trainer: lightning.Trainer) -> None:
        """Waits for the save before, and tells every rank how it went. A run goes on without a checkpoint, unless it
        was the last: that raises RunFailed."""
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        with trainer.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]  # to be counted as such
            outcome = trainer.strategy.broadcast(None if begun.outcome is None else begun.outcome.result())
        assert outcome is not None
        if self._folder.best_checkpoint(begun.step) in outcome.failed:
            del self._best[begun.step]
        step_checkpoint = self._folder.step_checkpoint(begun.step)
        if begun.last and step_checkpoint in outcome.failed:
            raise RunFailed(self._problem(step_checkpoint, outcome))
        self._tell(outcome)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """The save that was on its way is finished and spoken of; other ranks may not be there to hear of it."""
        if self._begun is not None and self._begun.outcome is not None:
            self._tell(self._begun.outcome.result())
        self._begun = None

    def _tell(self, outcome: _Outcome) -> None:
        for path in outcome.failed:
            self._say(f"warning     {self._problem(path, outcome)}; training goes on")
        for note in outcome.notes:
            self._say(note)

    def _problem(self, path: Path, outcome: _Outcome) -> str:
        kept = self._folder.step_checkpoints()
        have = f"the last good checkpoint is of step {step_of(kept[0])}" if kept else "there is no checkpoint yet"
        return f"{path}: cannot be written ({outcome.failed[path]}); {have}"

    def _prune(self) -> None:
        """What is no longer to be kept goes, now that a newer one is durable."""
        older = self._folder.step_checkpoints()[1:]
        # Those of every n-th step first: a run that was stopped on the way has others besides, and is to keep what it
        # would have had.
        older.sort(key=lambda path: (step_of(path) % self.every == 0, step_of(path)), reverse=True)
        for old in older[self.keep_last - 1 :]:
            old.unlink(missing_ok=True)
        self._folder.drop_superseded()

    def export(self, checkpoint: Path, target: Path) -> None:
        """The weights of a checkpoint alone, as safetensors. A failure is said and ends nothing: the checkpoint has
        them too."""
        for note in self._export(checkpoint, target):
            self._say(note)

    @staticmethod
    def _export(checkpoint: Path, target: Path) -> list[str]:
        try:
            export_weights(checkpoint, target)
        except (OSError, UserError) as error:
            return [f"warning     {target}: cannot be written ({error})"]
        return []

"""When a checkpoint is written and which ones stay: the last k steps, the best k validations, and the state a run stops in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import Checkpoint

from hybridlm.checkpoint import export_weights
from hybridlm.config.section import ConfigError, RunFailed
from hybridlm.run_folder import step_of
from hybridlm.train.checkpoint_io import AtomicCheckpointIO

if TYPE_CHECKING:
    from hybridlm.config.train import TrainerConfig
    from hybridlm.run_folder import RunFolder
    from hybridlm.train.stopping import Stopping


class Checkpoints(Checkpoint):
    """Saves at the end of an optimizer step, behind the validation where one is due, so that no validation is lost or seen twice.

    Lightning calls callbacks of this class after all others, whose state the checkpoint holds. (Its ModelCheckpoint saves before the
    validation, forgets the file that a run was resumed from, and deletes by lists that a crash leaves wrong: here the folder is the list.)
    """

    def __init__(self, folder: RunFolder, settings: TrainerConfig, stopping: Stopping, say: Callable[[str], None]) -> None:
        """``say`` prints a line on the first rank."""
        self._folder, self.stopping, self._say = folder, stopping, say
        self.every, self.keep_last, self.keep_best = settings.ckpt_every, settings.keep_last, settings.keep_best
        self._val_every = settings.val_every
        self._step = 0  # the last one that was looked at
        self._best: dict[int, float] = {}  # bits per byte by step, of the best checkpoints

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
            self._after_step(trainer, best=self._among_best(trainer.global_step, float(trainer.callback_metrics["val/bpb"])))

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = {step: score for step, score in state_dict["best"].items() if self._folder.best_checkpoint(step).exists()}

    def _after_step(self, trainer: lightning.Trainer, *, best: bool) -> None:
        self._step = step = trainer.global_step
        reason = self.stopping.reason(trainer)
        last = step >= trainer.max_steps or trainer.should_stop or reason is not None
        written = False
        if last or step % self.every == 0:
            written = self._save(trainer, self._folder.step_checkpoint(step), last=last)
        if best:
            self._save_best(trainer, self._folder.step_checkpoint(step) if written else None)
        if written and trainer.is_global_zero:
            self._prune()
        if reason is not None:
            self.stopping.stop(trainer, reason)

    def _among_best(self, step: int, score: float) -> bool:
        """Whether this validation belongs to the best, in which case it takes its place: each checkpoint of this step then says so."""
        if not math.isfinite(score):
            return False
        ranked = sorted({**self._best, step: score}.items(), key=lambda item: (item[1], item[0]))[: self.keep_best]
        self._best = dict(ranked)
        return step in self._best

    def _save_best(self, trainer: lightning.Trainer, same: Path | None) -> None:
        """``same``: a checkpoint of this very step, which only needs a second name."""
        path = self._folder.best_checkpoint(self._step)
        if same is None:
            written = self._save(trainer, path, last=False)
        else:
            writer = _writer(trainer)
            if trainer.is_global_zero:
                writer.duplicate(same, path)
            written = self._is_written(trainer, path, last=False)
        if not written:
            del self._best[self._step]
        elif trainer.is_global_zero:
            for old in self._folder.best_checkpoints():
                if step_of(old) not in self._best:
                    old.unlink(missing_ok=True)
            self.export(path, self._folder.best_weights)

    def _save(self, trainer: lightning.Trainer, path: Path, *, last: bool) -> bool:
        trainer.save_checkpoint(path)
        return self._is_written(trainer, path, last=last)

    def _is_written(self, trainer: lightning.Trainer, path: Path, *, last: bool) -> bool:
        """Whether it is on the disk, the same on every rank. A run goes on without it, unless it was the last: that raises RunFailed."""
        error = trainer.strategy.broadcast(_writer(trainer).error)
        if error is None:
            return True
        kept = self._folder.step_checkpoints()
        have = f"the last good checkpoint is of step {step_of(kept[0])}" if kept else "there is no checkpoint yet"
        if last:
            raise RunFailed(f"{path}: cannot be written ({error}); {have}")
        self._say(f"warning     {path}: cannot be written ({error}); {have}; training goes on")
        return False

    def _prune(self) -> None:
        """What is no longer to be kept goes, now that a newer one is durable."""
        older = self._folder.step_checkpoints()[1:]
        # Those of every n-th step first: a run that was stopped on the way has others besides, and is to keep what it would have had.
        older.sort(key=lambda path: (step_of(path) % self.every == 0, step_of(path)), reverse=True)
        for old in older[self.keep_last - 1 :]:
            old.unlink(missing_ok=True)
        self._folder.drop_superseded()

    def export(self, checkpoint: Path, target: Path) -> None:
        """The weights of a checkpoint alone, as safetensors. A failure is said and ends nothing: the checkpoint has them too."""
        try:
            export_weights(checkpoint, target)
        except (OSError, ConfigError) as error:
            self._say(f"warning     {target}: cannot be written ({error})")


def _writer(trainer: lightning.Trainer) -> AtomicCheckpointIO:
    writer = trainer.strategy.checkpoint_io
    assert isinstance(writer, AtomicCheckpointIO)
    return writer

"""When a checkpoint is written and which ones are kept: the last k steps, the best k validations, and the state a run
stops in."""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from hybridlm.config.train import TrainerConfig
from hybridlm.errors import RunFailed, UserError
from hybridlm.files.checksum import closing_line
from hybridlm.files.durable import replaced
from hybridlm.machine.device import CPU
from hybridlm.runs.checkpoint import export_weights
from hybridlm.runs.run_folder import RunFolder, step_of
from hybridlm.train.stopping import Stopping
from hybridlm.train.validation import validation_score


class Checkpoints(Checkpoint):
    """Saves at the end of an optimizer step, after the validation if one is due, so that no validation is lost or run
    twice.

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
        self._val_every, self._in_background = settings.val_every, settings.async_checkpoints
        self._step = 0  # the last step that was looked at
        self._best: dict[int, float] = {}  # score by step, of the best checkpoints
        self._pending: list[Path] = []  # the names of a checkpoint whose write may still be running

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
            self._finish_save(trainer)  # only checkpoints that were written are ranked
            self._after_step(trainer, best=self._among_best(trainer.global_step, validation_score(trainer)))

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for step in state_dict["best"]:
            latest, best = self._folder.step_checkpoint(step), self._folder.best_checkpoint(step)
            if latest.exists() and not best.exists():  # the run was killed before the file got its second name
                add_name(latest, best)
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
            self._finish_save(trainer)
            trainer.save_checkpoint(paths[0])
            self._pending = paths
            if last or not self._in_background:
                self._finish_save(trainer, last=last)
        if reason is not None:
            self.stopping.stop(trainer, reason)

    def _among_best(self, step: int, score: float) -> bool:
        """Whether this validation is among the best. If so it is ranked, and every checkpoint of this step records
        that."""
        if not math.isfinite(score):
            return False
        self._best[step] = score
        self._best = dict(sorted(self._best.items(), key=lambda item: (item[1], item[0]))[: self.keep_best])
        return step in self._best

    def _finish_save(self, trainer: lightning.Trainer, *, last: bool = False) -> None:
        """Waits for the pending save and reports to every rank how it went. The run continues without a checkpoint
        that could not be written, unless it is the last one: that raises RunFailed."""
        if not self._pending:
            return
        paths, self._pending = self._pending, []
        with trainer.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]  # counted as such
            failed = trainer.strategy.broadcast(self._complete(trainer, paths) if trainer.is_global_zero else {})
        if self._folder.best_checkpoint(step_of(paths[0])) in failed:
            del self._best[step_of(paths[0])]
        if last and paths[0] in failed:
            raise RunFailed(self._problem(paths[0], failed[paths[0]]))
        self._report(failed)

    def _complete(self, trainer: lightning.Trainer, paths: list[Path]) -> dict[Path, str]:
        """On the first rank: waits until the first of ``paths`` is written, adds the others, and deletes the
        checkpoints that are no longer kept. Returns what could not be written, and why."""
        writer: Any = trainer.strategy.checkpoint_io
        writer.teardown()
        first, *others = paths
        if (error := getattr(writer, "checkpoint_io", writer).error) is not None:  # of the one that a thread calls
            return dict.fromkeys(paths, error)
        failed = {path: error for path in others if (error := add_name(first, path)) is not None}
        best = self._folder.best_checkpoint(step_of(first))
        beaten = [] if best in failed or best not in paths else self._folder.best_checkpoints()
        for old in beaten:
            if step_of(old) not in self._best:
                old.unlink(missing_ok=True)
        if first != best:
            self._prune()
        return failed

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Finishes the pending save and reports on it; the other ranks may be gone."""
        if self._pending and trainer.is_global_zero:
            self._report(self._complete(trainer, self._pending))
        self._pending = []

    def _report(self, failed: dict[Path, str]) -> None:
        for path, error in failed.items():
            self._say(f"warning     {self._problem(path, error)}; training continues")

    def _problem(self, path: Path, error: str) -> str:
        kept = self._folder.step_checkpoints()
        have = f"the last good checkpoint is from step {step_of(kept[0])}" if kept else "there is no checkpoint yet"
        return f"{path}: cannot be written ({error}); {have}"

    def _prune(self) -> None:
        """Deletes the older checkpoints beyond ``keep_last``, now that a newer one is durable."""
        older = self._folder.step_checkpoints()[1:]
        # A run that was stopped has checkpoints of other steps besides: those of every n-th step are kept first, as in
        # a run that was not.
        older.sort(key=lambda path: (step_of(path) % self.every == 0, step_of(path)), reverse=True)
        for old in older[self.keep_last - 1 :]:
            old.unlink(missing_ok=True)
        self._folder.drop_superseded()

    def export(self, step: int) -> None:
        """At the end of a run: the weights alone of the last checkpoint, that of ``step``, and of the best one, as
        safetensors. A failure is reported and ends nothing: the checkpoints have the weights too."""
        exports = {self._folder.weights: self._folder.step_checkpoint(step)}
        if self._best:
            best = min(self._best, key=self._best.__getitem__)
            exports[self._folder.best_weights] = self._folder.best_checkpoint(best)
        for target, checkpoint in exports.items():
            try:
                export_weights(checkpoint, target)
            except (OSError, UserError) as error:
                self._say(f"warning     {target}: cannot be written ({error})")


class AtomicCheckpointIO(TorchCheckpointIO):
    """A crash at any moment leaves the old file or the new one. (Lightning's own writer goes through $TMPDIR, and a
    move from there may be a copy.)

    A file that cannot be written raises nothing: only the first rank writes, and the others would wait for it forever.
    The reason is left in ``error``, for the caller to share with all ranks.
    """

    error: str | None = None  # why the last file could not be written; None: it is on disk

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        target, self.error = Path(path), None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced(target) as partial, open(partial, "wb") as file:
                hashed = _Hashed(file)
                torch.save(checkpoint, cast(IO[bytes], hashed))
                if hashed.error is not None:
                    raise hashed.error
                file.write(closing_line(hashed.digest.hexdigest()))
        except OSError as error:
            self.error = error.strerror or str(error)


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """Lightning's asynchronous writer: a save returns once the state has been copied, and a thread writes the copy.

    The copy is made in host memory (Lightning's own would stay on the device), and one write runs at a time.
    ``teardown`` waits for it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        self.teardown()
        super().save_checkpoint(move_data_to_device(checkpoint, torch.device(CPU)), path, storage_options)


class _Hashed(io.RawIOBase):
    """A binary file that is hashed as it is written.

    torch.save calls ``write`` from C++, which turns an exception into another one about a position in the archive: the
    first error is kept, and what follows is dropped.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.error is None:
            try:
                self._file.write(data)
                self.digest.update(data)
            except BaseException as error:  # a full disk, or Ctrl-C
                self.error = error
        return len(data)


def add_name(source: Path, target: Path) -> str | None:
    """Gives the checkpoint ``source`` the second name ``target``: a hard link where the file system has them, otherwise
    a copy. Returns why it could not, or None."""
    try:
        with replaced(target) as partial:
            try:
                os.link(source, partial)
            except OSError:
                shutil.copyfile(source, partial)
    except OSError as error:
        return error.strerror or str(error)
    return None

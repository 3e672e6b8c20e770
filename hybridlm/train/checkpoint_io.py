"""How a checkpoint is written: beside its place, closed with a checksum, synced, renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from hybridlm.files.checksum import closing_line
from hybridlm.files.durable import replaced
from hybridlm.train.background import Background, snapshot

if TYPE_CHECKING:
    import lightning


class AtomicCheckpointIO(TorchCheckpointIO):
    """A crash at any moment leaves the old file or the new one. (Lightning's own writer goes through $TMPDIR, where a
    move may be a copy.)

    A file that cannot be written raises nothing: this runs on the first rank alone, and the others would wait for it
    for ever. The reason is left in ``error``, for the caller to tell all ranks.

    With ``threaded`` a save takes a copy of the state and returns; ``background`` writes it, one file after the other.
    What is to happen once it is written is to be started there too.
    """

    def __init__(self, *, threaded: bool = False) -> None:
        super().__init__()
        self.background = Background(threaded=threaded)
        self.error: str | None = None  # of the last file; None: it is on the disk

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        self.background.wait()  # two copies of the state at once would be one too many
        content = snapshot(checkpoint) if self.background.threaded else checkpoint
        self.background.start(lambda: self._write(content, Path(path)))

    def teardown(self) -> None:
        """However a run ends, what was begun is finished."""
        self.background.close()

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        self.error = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced(target) as partial, open(partial, "wb") as file:
                hashed = _Hashed(file)
                torch.save(checkpoint, hashed)
                hashed.close()
        except OSError as error:
            self.error = error.strerror or str(error)

    def duplicate(self, source: Path, target: Path) -> None:
        """Gives a written checkpoint a second name: a link where the disk has them, else a copy."""
        self.error = None
        try:
            with replaced(target) as partial:
                try:
                    os.link(source, partial)
                except OSError:
                    shutil.copyfile(source, partial)
        except OSError as error:
            self.error = error.strerror or str(error)


class _Hashed:
    """A binary file that is hashed while it is written.

    torch.save calls ``write`` from C++, where an exception turns into another one about a position in the archive: the
    first error is kept, what follows is dropped, and ``close`` raises it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._error: BaseException | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
                self._digest.update(data)
            except BaseException as error:  # a full disk, or Ctrl-C
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Nothing to do before the end."""

    def close(self) -> None:
        """Adds the checksum. Raises the error of an earlier write."""
        if self._error is not None:
            raise self._error
        self._file.write(closing_line(self._digest.hexdigest()))
        self._file.flush()


def writer_of(trainer: lightning.Trainer) -> AtomicCheckpointIO:
    """What writes the checkpoints of ``trainer``."""
    writer = trainer.strategy.checkpoint_io
    assert isinstance(writer, AtomicCheckpointIO)
    return writer

"""How a checkpoint is written: to a temporary file beside its place, closed with a checksum, synced, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from hybridlm.files.checksum import closing_line
from hybridlm.files.durable import replaced
from hybridlm.machine.device import CPU

if TYPE_CHECKING:
    import lightning


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
                hashed.close()
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


class _Hashed:
    """A binary file that is hashed as it is written.

    torch.save calls ``write`` from C++, which turns an exception into another one about a position in the archive: the
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
        """Appends the checksum. Raises the error of an earlier write."""
        if self._error is not None:
            raise self._error
        self._file.write(closing_line(self._digest.hexdigest()))
        self._file.flush()


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


def writer_of(trainer: lightning.Trainer) -> AtomicCheckpointIO:
    """The one that writes the checkpoints of ``trainer``, in a thread or not."""
    writer = trainer.strategy.checkpoint_io
    if isinstance(writer, BackgroundCheckpointIO):
        writer = cast(AtomicCheckpointIO, writer.checkpoint_io)
    assert isinstance(writer, AtomicCheckpointIO)
    return writer

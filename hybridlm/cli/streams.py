"""Standard output and standard error of every command: characters that cannot be encoded are replaced, and a reader
that goes away, or a full disk behind a redirection, does not end the command. Standard library only."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, BinaryIO, Literal, TextIO, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

Lost = Literal["ends", "continues"]  # what a command does once its output cannot be read any more

_CLOSED = {"stdin": "r", "stdout": "w", "stderr": "w"}  # the mode in which each is opened where it was closed
_lost: Lost = "ends"


def prepare_streams(lost: Lost | None = None) -> None:
    """Sets the standard streams up as described above; calling it again changes nothing. Every entry point calls it.

    lost: whether, from now on, the process ends with code 0 if standard output is lost (the reader has read enough)
    or continues without it; None: as before.
    """
    global _lost
    _lost = lost or _lost
    for name, mode in _CLOSED.items():
        if getattr(sys, name) is None:  # closed by the caller (`<&-`)
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, until the process ends
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not the stream of a notebook
            stream.reconfigure(errors=errors)
            if type(stream) is io.TextIOWrapper:
                setattr(sys, name, _lasting(stream, name))


def _lasting(stream: io.TextIOWrapper, name: str) -> TextIO:
    """``stream`` on top of an ``_Outlet``, if it is on top of a plain file; Windows consoles, which cannot be lost,
    stay as they are."""
    buffer = stream.buffer
    raw = getattr(buffer, "raw", buffer)  # unbuffered with `python -u`
    if type(raw) is not io.FileIO:
        return stream
    stream.flush()
    outlet = _Outlet(stream, name)
    return io.TextIOWrapper(
        cast(BinaryIO, outlet if buffer is raw else io.BufferedWriter(outlet)),
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Outlet(io.FileIO):
    """The file of a standard stream. Once it cannot be written any more, output is discarded, also that of processes
    started later."""

    def __init__(self, stream: TextIO, name: str) -> None:
        """stream: the owner of the descriptor, kept because it would close it when collected."""
        super().__init__(stream.fileno(), "wb", closefd=False)
        self._stream, self._called = stream, name

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BlockingIOError:  # a slow reader behind a non-blocking pipe
            raise
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if _lost == "continues" or self._called == "stderr":
                return memoryview(data).nbytes
            if isinstance(error, BrokenPipeError):
                sys.exit(0)
            raise OSError(error.errno, error.strerror, f"<{self._called}>") from None

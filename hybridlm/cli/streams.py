"""Standard output and standard error as every command has them: letters that cannot be shown are replaced, and a reader
that goes away, or a disk that fills up behind a redirection, does not break what is being done. The standard library
alone."""

from __future__ import annotations

import io
import os
import sys
from typing import Literal, TextIO

Lost = Literal["ends", "goes on"]  # what a command does once nobody can read its output any more

_CLOSED = {"stdin": "r", "stdout": "w", "stderr": "w"}  # the mode in which each is opened where it was closed
_lost: Lost = "ends"


def prepare_streams(lost: Lost | None = None) -> None:
    """Makes the standard streams what the top of this page says; again changes nothing. Every entry into the process
    calls it.

    lost: from here on, where standard output is lost the process ends with code 0 (the reader has what it wanted), or
    goes on without; None: as it was.
    """
    global _lost
    _lost = lost or _lost
    for name, mode in _CLOSED.items():
        if getattr(sys, name) is None:  # closed by whoever started this (`<&-`): nothing to read, and nobody reads
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, for as long as the process lives
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not what a notebook puts in its place
            stream.reconfigure(errors=errors)
            if type(stream) is io.TextIOWrapper:
                setattr(sys, name, _lasting(stream, name))


def _lasting(stream: io.TextIOWrapper, name: str) -> TextIO:
    """``stream`` above an ``_Outlet``, where it stands above a plain file; the consoles of Windows, which cannot be
    lost, keep theirs."""
    buffer = stream.buffer
    raw = getattr(buffer, "raw", buffer)  # `python -u` has no buffer between
    if type(raw) is not io.FileIO:
        return stream
    stream.flush()
    outlet = _Outlet(stream, name)
    return io.TextIOWrapper(
        outlet if buffer is raw else io.BufferedWriter(outlet),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Outlet(io.FileIO):
    """The file of a standard stream. Once it takes nothing more, what is written goes nowhere, also from processes
    started later."""

    def __init__(self, stream: TextIO, name: str) -> None:
        """stream: whose descriptor it is, and who would close it if nobody held him."""
        super().__init__(stream.fileno(), "wb", closefd=False)
        self._stream, self._called = stream, name

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except BlockingIOError:  # a reader that is slow, behind a pipe that does not wait
            raise
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if _lost == "goes on" or self._called == "stderr":
                return len(data)
            if isinstance(error, BrokenPipeError):
                sys.exit(0)
            raise OSError(error.errno, error.strerror, f"<{self._called}>") from None

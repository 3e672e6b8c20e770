"""How a command fails: one line per problem on standard error and an exit code; the traceback only on request."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import resource  # here: later there may be no memory for it
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from hybridlm.cli.streams import Lost, prepare_streams
from hybridlm.errors import RunFailed, UserError, printable
from hybridlm.machine.launcher import INTERRUPTED

EXIT_CODE = 2
TRACEBACK_VARIABLE = "HYBRIDLM_TRACEBACK"

_WHERE = f" ({TRACEBACK_VARIABLE}=1 shows where)"
_PLACES = "hydra.run.dir (a run), hydra.sweep.dir (a sweep), data.out (prepared data), or $HYBRIDLM_CACHE (the cache)"
_ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), f"choose a writable place with {_PLACES}"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space, or choose another disk with {_PLACES}"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
}
_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "failed to map segment",
    "start new thread",
)  # in the messages of libraries, whatever they raise


@contextmanager
def reported(lost: Lost | None = None) -> Iterator[None]:
    """Ends the process with one line per problem: with code 2 on UserError, 130 on Ctrl-C, 1 on RunFailed, on errors of
    the system (OSError) and when memory runs out. Other errors are bugs and propagate.

    Standard streams are prepared by ``prepare_streams(lost)``. With HYBRIDLM_TRACEBACK=1 the traceback is printed
    first.
    """
    prepare_streams(lost)
    try:
        yield
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the clean-up silently
        _end(error, "interrupted", INTERRUPTED)
    except Exception as error:
        lines = lines_of(error)
        if lines is None:
            raise
        if _without_memory(error):  # the finalisers of libraries fail, too, and add nothing
            sys.unraisablehook = lambda _: None
        _end(error, lines, EXIT_CODE if isinstance(error, UserError) else 1)


def lines_of(error: Exception) -> str | None:
    """The lines that the user sees, one per problem; None: the error is a bug. Control characters from untrusted files
    are escaped."""
    if isinstance(error, UserError | RunFailed):
        problems = error.problems if isinstance(error, UserError) else [str(error)]
        return "\n".join(f"{error.label}: {printable(line)}" for problem in problems for line in problem.split("\n"))
    problem = _of_the_machine(error)
    return None if problem is None else f"error: {printable(problem)}"


def _of_the_machine(error: Exception) -> str | None:
    """The system error, and what can be done about it; None: it is not one."""
    if _without_memory(error):
        return (
            f"out of memory{_limit()}; use a smaller model or data.batch_size (`hybridlm plan` shows what a run needs),"
            f" close other programs, or raise the limit{_WHERE}"
        )
    if not isinstance(error, OSError):
        return None
    if error.filename is None and error.errno == errno.ENOENT and not _has_working_folder():
        return "the working directory no longer exists; change to another one"
    place = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    where = "" if place is None else f"{place}: "
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{where}{what}" + (f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else _WHERE)


def _without_memory(error: BaseException) -> bool:
    """Whether memory ran out, according to the error or its causes. A library that is loaded or called without memory
    may fail in other ways: if this process has a limit, those count, too."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return any(
        isinstance(one, MemoryError)
        or (isinstance(one, OSError) and one.errno == errno.ENOMEM)
        or (isinstance(one, ImportError | RuntimeError) and any(words in str(one) for words in _NO_MEMORY))
        or (isinstance(one, SystemError) and bool(_limit()))
        for one in chain
    )


def _limit() -> str:
    """The limit on the address space of this process, if there is one."""
    if resource is None:
        return ""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return "" if limit == resource.RLIM_INFINITY else f": this process may address {limit / 2**30:.1f} GiB (ulimit -v)"


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _end(error: BaseException, lines: str, code: int) -> None:
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    print(lines, file=sys.stderr)
    sys.exit(code)

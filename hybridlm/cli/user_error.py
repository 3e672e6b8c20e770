"""How a command ends that cannot go on: lines on standard error and an exit code, the traceback only on request."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import resource  # here, as later there may be no memory for it
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from hybridlm.cli.streams import Lost, prepare_streams
from hybridlm.errors import RunFailed, UserError, printable
from hybridlm.machine.signals import INTERRUPTED

EXIT_CODE = 2
TRACEBACK_VARIABLE = "HYBRIDLM_TRACEBACK"

_WHERE = f" ({TRACEBACK_VARIABLE}=1 shows where)"
_PLACES = (
    "hydra.run.dir (a run), hydra.sweep.dir (a sweep), data.out (prepared data), or $HYBRIDLM_CACHE (all that is kept)"
)
_ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), f"name a place that can be written with {_PLACES}"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space, or name a place on another disk with {_PLACES}"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
}
_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "failed to map segment",
    "start new thread",
)  # of libraries, in whatever they raise


@contextmanager
def reported(lost: Lost | None = None) -> Iterator[None]:
    """End the process with one line per problem: with code 2 where the block raises UserError, 130 where Ctrl-C does, 1
    where it raises RunFailed, where the machine refuses (OSError) and where there is no memory left. Other errors are
    ours and pass.

    Standard streams are as ``prepare_streams`` makes them; ``lost`` is its. With HYBRIDLM_TRACEBACK=1 the traceback
    comes first.
    """
    prepare_streams(lost)
    try:
        yield
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more ends what is left to be done, without a word
        _end(error, "interrupted", INTERRUPTED)
    except Exception as error:
        lines = told(error)
        if lines is None:
            raise
        if _without_memory(error):  # what libraries do at the end fails, too, and has nothing to add
            sys.unraisablehook = lambda _: None
        _end(error, lines, EXIT_CODE if isinstance(error, UserError) else 1)


def told(error: Exception) -> str | None:
    """What the user reads of it, a line per problem; None: a fault of ours. What a file of a stranger holds cannot move
    the cursor."""
    if isinstance(error, UserError | RunFailed):
        problems = error.problems if isinstance(error, UserError) else [str(error)]
        return "\n".join(f"{error.label}: {printable(line)}" for problem in problems for line in problem.split("\n"))
    problem = _of_the_machine(error)
    return None if problem is None else f"error: {printable(problem)}"


def _of_the_machine(error: Exception) -> str | None:
    """What refused, and what can be done; None: the error is not the machine's."""
    if _without_memory(error):
        return (
            f"out of memory{_limit()}; take a smaller model or data.batch_size (`hybridlm plan` says what a run needs),"
            f" end other programs, or raise the limit{_WHERE}"
        )
    if not isinstance(error, OSError):
        return None
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.filename is None and error.errno == errno.ENOENT and not _has_working_folder():
        return "the folder in which this was started does not exist any more; change to another one"
    where = (
        ""
        if error.filename is None
        else f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: "
    )
    return f"{where}{what}" + (f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else _WHERE)


def _without_memory(error: BaseException) -> bool:
    """Whether it, or what it came of, says so. A library that is loaded or called without memory may break in other
    ways: where this process has a limit, those count, too."""
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
    """The limit of the memory that this process may address, where there is one."""
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

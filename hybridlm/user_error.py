"""How a mistake of the user ends a command: its lines on stderr and exit code 2, the traceback only on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hybridlm.errors import RunFailed, UserError, printable

EXIT_CODE = 2
TRACEBACK_VARIABLE = "HYBRIDLM_TRACEBACK"


@contextmanager
def reported() -> Iterator[None]:
    """End the process with code 2 and one line per problem where the block raises UserError, with code 1 and a line where it raises
    RunFailed. Where the reader of standard output has closed it (``| head``) nothing is left to do: code 0. Everything else passes.

    With HYBRIDLM_TRACEBACK=1 the traceback stands before the lines.
    """
    try:
        yield
    except (UserError, RunFailed) as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            import traceback

            traceback.print_exception(error)
        print(told(error), file=sys.stderr)
        sys.exit(1 if isinstance(error, RunFailed) else EXIT_CODE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        sys.exit(0)


def told(error: UserError | RunFailed) -> str:
    """What the user reads of it: a line per problem. What a file of a stranger holds cannot move the cursor."""
    problems = error.problems if isinstance(error, UserError) else [str(error)]
    return "\n".join(f"{error.label}: {printable(line)}" for problem in problems for line in problem.split("\n"))

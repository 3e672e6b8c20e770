"""How a mistake of the user ends a command: its lines on stderr and exit code 2, the traceback only on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hybridlm.config.section import ConfigError

EXIT_CODE = 2
TRACEBACK_VARIABLE = "HYBRIDLM_TRACEBACK"


@contextmanager
def reported() -> Iterator[None]:
    """End the process with code 2 and one line per problem where the block raises ConfigError. Everything else passes.

    With HYBRIDLM_TRACEBACK=1 the traceback stands before the lines.
    """
    try:
        yield
    except ConfigError as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            import traceback

            traceback.print_exception(error)
        for problem in error.problems:
            print(f"config error: {problem}", file=sys.stderr)
        sys.exit(EXIT_CODE)

"""train.log of a run folder. Standard library only."""

from __future__ import annotations

import logging
import sys


class LogFile(logging.FileHandler):
    """A copy of the messages on the screen: if it cannot be written, one warning is printed and the run continues."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", errors="backslashreplace", delay=True)
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # the file is opened here
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            print(
                f"warning: {self.baseFilename}: cannot be written ({error.strerror}); messages are on the screen only",
                file=sys.stderr,
            )

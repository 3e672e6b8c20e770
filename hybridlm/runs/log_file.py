"""train.log of a run folder, as Hydra's logging is told to write it (conf/hydra/job_logging/plain.yaml). The standard
library alone."""

from __future__ import annotations

import logging
import sys


class LogFile(logging.FileHandler):
    """A file in which every message stands that the screen shows, too: where it cannot be written, that is said once
    and ends nothing."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", errors="backslashreplace", delay=True)
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it is opened here
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            print(
                f"warning: {self.baseFilename}: cannot be written ({error.strerror}); the screen shows all of it",
                file=sys.stderr,
            )

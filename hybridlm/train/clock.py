"""Where the time of a run goes, by the marks that Lightning's own loop sets for profilers."""

from __future__ import annotations

import time

from lightning.pytorch.profilers import Profiler

DATA, CHECKPOINTS = "data", "checkpoints"


def _kind(action: str) -> str | None:
    """What an action of Lightning 2.6 counts as, if it is one to be timed."""
    if action.endswith(".train_dataloader_next"):
        return DATA
    return CHECKPOINTS if action == "save_checkpoint" else None


class Clock(Profiler):
    """Seconds spent waiting for training data and writing checkpoints, of this process. Neither is a part of the
    other."""

    def __init__(self) -> None:
        super().__init__()
        self._began: dict[str, float] = {}
        self._spent = {DATA: 0.0, CHECKPOINTS: 0.0}
        self._taken = dict(self._spent)

    def start(self, action_name: str) -> None:
        if (kind := _kind(action_name)) is not None:
            self._began[kind] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if (kind := _kind(action_name)) is not None and kind in self._began:
            self._spent[kind] += time.perf_counter() - self._began.pop(kind)

    def total(self, kind: str) -> float:
        """Seconds since the beginning."""
        return self._spent[kind]

    def take(self, kind: str) -> float:
        """Seconds since it was last asked for this kind."""
        seconds = self._spent[kind] - self._taken[kind]
        self._taken[kind] = self._spent[kind]
        return seconds

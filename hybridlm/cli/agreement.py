"""What the processes of one run tell each other before it begins.

Those that a launcher (torchrun, srun) has started together meet in a folder of files, one for each. The first process
decides: which run begins or goes on, and from which checkpoint; the configuration is in the run folder by then. The
others wait for its word, and then all of them until every one is ready: where one is refused, or dies, none is left
waiting in a collective call for ever.

Processes that Lightning starts beside the first one find the word in an environment variable.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from hybridlm.errors import RunFailed, UserError
from hybridlm.files.durable import replaced
from hybridlm.files.folders import first_missing, remove_empty
from hybridlm.files.plain import Unreadable, read_json
from hybridlm.machine.launcher import Launch, is_first_rank

VARIABLE = "HYBRIDLM_WORD"
_LOOK_EVERY, _BEAT_EVERY = 0.1, 2.0  # seconds
_ARRIVAL, _SILENCE, _FAREWELL = 600.0, 120.0, 10.0  # a file system over a network may show a change a minute later


@dataclass(frozen=True)
class Word:
    """What the first process has decided. folder: of the run; checkpoint: to go on from; cwd: where relative paths
    start."""

    folder: str
    checkpoint: str | None
    cwd: str

    def environment(self) -> dict[str, str]:
        """What tells it to the processes that Lightning starts."""
        return {VARIABLE: json.dumps(asdict(self))}


def inherited() -> Word | None:
    """The word for a process that Lightning started beside the first one; None: this is none."""
    told = os.environ.get(VARIABLE)
    return None if told is None or is_first_rank() else Word(**json.loads(told))


class Alone:
    """The agreement of a process that no launcher has started."""

    def __enter__(self) -> Alone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody is waiting."""

    def decide(self, word: Word | None) -> None:
        """Nobody is waiting."""

    def meet(self) -> None:
        """Nobody is waiting."""


class Agreement:
    """The agreement of a launch, as a context; what leaves it by an exception is told to the others."""

    def __init__(self, launched: Launch, place: Path) -> None:
        """place: a folder that all processes see and no other launch uses at the same time under the same name."""
        self._rank, self._all = launched.rank, range(launched.processes)
        self._folder = place / f".start-{_key(launched)}"
        self._state: dict[str, object] = {"state": "here"}
        self._beats = threading.Event()
        self._made: Path | None = None

    def __enter__(self) -> Agreement:
        self._made = first_missing(self._folder.parent)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._say(self._state)
        except OSError as error:
            raise UserError(
                f"{self._folder.parent} cannot be written ({error.strerror or error}); name another (hydra.run.dir=...)"
            ) from None
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._state["state"] != "met":  # then nobody looks any more
            said = (
                str(error).split("\n")[0]
                if isinstance(error, UserError | RunFailed)
                else ""
                if error is None
                else type(error).__name__
            )
            with suppress(OSError):
                self._say({**self._state, "state": "gone", "problem": said})
        self._tidy(_FAREWELL)
        self._beats.set()

    def decide(self, word: Word | None) -> None:
        """Of the first process: its word; None: there is nothing to do."""
        self._say({"state": "decided", "word": None if word is None else asdict(word)})

    def word(self) -> Word | None:
        """Of the others: waits for it. UserError: the first process was refused; RunFailed: it does not answer."""
        word = self._wait([0], lambda state: "word" in state)[0]["word"]
        return Word(**word) if isinstance(word, dict) else None

    def meet(self) -> None:
        """Waits until all processes have come here. UserError: one was refused; RunFailed: one does not answer."""
        self._say({**self._state, "ready": True})
        self._wait([rank for rank in self._all if rank != self._rank], lambda state: "ready" in state)
        self._say({**self._state, "state": "met"})
        if self._rank == 0:  # now, as a run that is killed later cannot
            threading.Thread(target=self._tidy, args=(_ARRIVAL,), daemon=True).start()

    def _file(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"

    def _say(self, state: dict[str, object]) -> None:
        self._state = state
        with replaced(self._file(self._rank)) as new:
            new.write_text(json.dumps(state), encoding="utf-8")

    def _read(self, rank: int) -> Mapping[str, object]:
        try:
            state = read_json(self._file(rank))
        except Unreadable:
            return {}
        return state if isinstance(state, dict) else {}

    def _wait(
        self, ranks: Sequence[int], enough: Callable[[Mapping[str, object]], bool]
    ) -> dict[int, Mapping[str, object]]:
        began = time.monotonic()
        heard = dict.fromkeys(ranks, (0, began))  # the last stamp of each file, and when it was new
        while True:
            found = {rank: self._read(rank) for rank in ranks}
            for rank, state in found.items():
                stamp = _stamp(self._file(rank))
                if stamp not in (0, heard[rank][0]):
                    heard[rank] = stamp, time.monotonic()
                if state.get("problem"):
                    raise UserError(f"process {self._rank} ends with process {rank} ({state['problem']})")
                silent = time.monotonic() - heard[rank][1]
                if silent > (_SILENCE if heard[rank][0] else _ARRIVAL):
                    raise RunFailed(
                        f"process {rank} of {len(self._all)} of this run has not been heard of for {silent:.0f} s"
                    )
            if all(enough(state) for state in found.values()):
                return found
            time.sleep(_LOOK_EVERY)

    def _beat(self) -> None:
        while not self._beats.wait(_BEAT_EVERY):
            with suppress(OSError):
                os.utime(self._file(self._rank))

    def _tidy(self, patience: float) -> None:
        """The files go once the others have read them. The others stay until then: a launcher ends all as soon as one
        has failed."""
        end = time.monotonic() + patience
        while self._folder.exists() and time.monotonic() < end and (self._rank > 0 or any(map(self._looks, self._all))):
            time.sleep(_LOOK_EVERY)
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        remove_empty(self._folder.parent, self._made)

    def _looks(self, rank: int) -> bool:
        """Whether a process may still look at the files of the others."""
        return self._read(rank).get("state") not in ("met", "gone")


def _key(launched: Launch) -> str:
    """The same in all processes of a launch, and another in every other launch."""
    restarts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    if launched.id is None and launched.nodes > 1:
        raise UserError(f"{launched.name} on {launched.nodes} nodes: give the launch a name of its own (--rdzv-id)")
    return "-".join([launched.name, str(os.getppid()) if launched.id is None else launched.id, *restarts])


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0

"""How the ranks of one run start together.

Ranks that a launcher (torchrun, srun) has started meet in a folder of files, one file per rank. The first rank decides
which run starts or resumes, and from which checkpoint; by then the configuration is in the run folder. The other ranks
wait for its decision, and then all ranks wait until every one is ready: if one is refused or dies, none is left waiting
in a collective call.

Ranks that the first one starts itself find the decision in an environment variable.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from hybridlm.errors import RunFailed, UserError
from hybridlm.files.durable import replaced
from hybridlm.files.folders import first_missing, remove_empty
from hybridlm.files.plain import Unreadable, read_json
from hybridlm.machine.launcher import Launch, is_first_rank

VARIABLE = "HYBRIDLM_DECISION"
_POLL, _HEARTBEAT = 0.1, 2.0  # seconds
_ARRIVAL, _SILENCE, _FAREWELL = 600.0, 120.0, 10.0  # seconds; a network file system may show a change a minute late


class Decision(NamedTuple):
    """What the first rank has decided. folder: of the run; checkpoint: to resume from; cwd: base of relative paths."""

    folder: str
    checkpoint: str | None
    cwd: str

    def environment(self) -> dict[str, str]:
        """Passes it to the ranks that this process starts."""
        return {VARIABLE: json.dumps(self._asdict())}


def inherited() -> Decision | None:
    """The decision in a rank that the first one has started; None in any other process."""
    text = os.environ.get(VARIABLE)
    return None if text is None or is_first_rank() else Decision(**json.loads(text))


class Rendezvous:
    """A context around the start of one rank; an exception that leaves it is reported to the other ranks."""

    def __init__(self, launched: Launch, place: Path) -> None:
        """place: a folder that all ranks see and that no other launch uses at the same time under the same name."""
        self._rank, self._ranks = launched.rank, range(launched.processes)
        self._folder = place / f".start-{_key(launched)}"
        self._state: dict[str, object] = {"state": "starting"}
        self._ended = threading.Event()
        self._made: Path | None = None

    def __enter__(self) -> Rendezvous:
        self._made = first_missing(self._folder.parent)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._publish({})
        except OSError as error:
            raise UserError(
                f"{self._folder.parent} cannot be written ({error.strerror or error}); choose another folder"
                " (hydra.run.dir=...)"
            ) from None
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._state["state"] != "met":  # nobody reads it after that
            told = isinstance(error, UserError | RunFailed)
            problem = str(error).split("\n")[0] if told else type(error).__name__ if error else ""
            with suppress(OSError):
                self._publish({"state": "ended", "problem": problem})
        self._clear(_FAREWELL)
        self._ended.set()

    def decide(self, decision: Decision | None) -> None:
        """Called by the first rank. None: there is nothing to do."""
        self._publish({"state": "decided", "decision": decision and decision._asdict()})

    def decision(self) -> Decision | None:
        """Called by the other ranks: waits for the first one. UserError: it was refused; RunFailed: no answer."""
        found = self._wait([0], lambda state: "decision" in state)[0]["decision"]
        return Decision(**found) if isinstance(found, dict) else None

    def meet(self) -> None:
        """Waits until all ranks have called it. UserError: one was refused; RunFailed: one does not answer."""
        self._publish({"ready": True})
        self._wait([rank for rank in self._ranks if rank != self._rank], lambda state: "ready" in state)
        self._publish({"state": "met"})
        if self._rank == 0:  # now, because a run that is killed later cannot
            threading.Thread(target=self._clear, args=(_ARRIVAL,), daemon=True).start()

    def _file(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"

    def _publish(self, changes: Mapping[str, object]) -> None:
        self._state = {**self._state, **changes}
        with replaced(self._file(self._rank)) as new:
            new.write_text(json.dumps(self._state), encoding="utf-8")

    def _read(self, rank: int) -> Mapping[str, object]:
        try:
            state = read_json(self._file(rank))
        except Unreadable:
            return {}
        return state if isinstance(state, dict) else {}

    def _wait(
        self, ranks: Sequence[int], enough: Callable[[Mapping[str, object]], bool]
    ) -> dict[int, Mapping[str, object]]:
        seen = dict.fromkeys(ranks, (0, time.monotonic()))  # the last change of each file, and when it was noticed
        while True:
            found = {rank: self._read(rank) for rank in ranks}
            for rank, state in found.items():
                changed = _changed(self._file(rank))
                if changed not in (0, seen[rank][0]):
                    seen[rank] = changed, time.monotonic()
                if state.get("problem"):
                    raise UserError(f"process {self._rank} ends with process {rank} ({state['problem']})")
                silent = time.monotonic() - seen[rank][1]
                if silent > (_SILENCE if seen[rank][0] else _ARRIVAL):
                    raise RunFailed(f"no sign of process {rank} of {len(self._ranks)} of this run for {silent:.0f} s")
            if all(enough(state) for state in found.values()):
                return found
            time.sleep(_POLL)

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT):
            with suppress(OSError):
                os.utime(self._file(self._rank))

    def _clear(self, patience: float) -> None:
        """Waits until the other ranks have read the files, then the first rank deletes them. The others wait, too: a
        launcher ends all ranks as soon as one has failed."""
        end = time.monotonic() + patience
        while self._folder.exists() and time.monotonic() < end and (self._rank > 0 or self._read_on()):
            time.sleep(_POLL)
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        remove_empty(self._folder.parent, self._made)

    def _read_on(self) -> bool:
        """Whether some rank may still read the files of the others."""
        return any(self._read(rank).get("state") not in ("met", "ended") for rank in self._ranks)


def _key(launched: Launch) -> str:
    """The same in all ranks of a launch, and different in every other launch."""
    restarts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    if launched.id is None and launched.nodes > 1:
        raise UserError(f"{launched.name} on {launched.nodes} nodes: give the launch an id of its own (--rdzv-id)")
    return "-".join([launched.name, str(os.getppid()) if launched.id is None else launched.id, *restarts])


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0

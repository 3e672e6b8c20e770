"""Who started this process: nobody, a launcher that starts one for each device (torchrun, srun), or the first process
of its run.

Decided from the environment alone, and from complete evidence: part of a launcher's variables, left behind by something
else, would make this process one of several that are not there. Everything else asks here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from hybridlm.config.overrides import value_of
from hybridlm.errors import ConfigError, UserError
from hybridlm.machine.signals import INTERRUPTED, SIGNALLED

LOOPBACK = "127.0.0.1"
_BY_ITSELF = "trainer.devices"  # the name of a launch by the first process
_WATCHED = (_BY_ITSELF, "torchrun", "srun")  # launchers that live as long as what they have started
_LOOK_EVERY, _FAREWELL, _TO_SAVE = 0.2, 3.0, 30.0  # seconds
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_CHILD = "HYBRIDLM_RANK"  # what the first process of a run tells those that it starts
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torch's variables: each process has all of them
_NODE = ("NODE_RANK", "GROUP_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_STEP = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NODELIST",
)
_STEP += ("SLURM_JOB_ID", "SLURM_STEP_ID")
_OTHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "JSM_NAMESPACE_SIZE": "jsrun"}
_PORTS = range(15_000, 31_384)  # below those that systems give to outgoing connections


@dataclass(frozen=True)
class Launch:
    """The processes that were started together, and which of them this one is."""

    name: str  # torchrun, srun, RANK and WORLD_SIZE (by something else), or trainer.devices (by the first of them)
    per_node: int
    nodes: int
    rank: int  # of this process among all
    local_rank: int  # among those of its node: also its GPU's
    node_rank: int
    address: str  # of the first one, where all meet
    port: int  # 0: any that is free
    id: str | None  # the same in all of them, and another the next time; None: there is nothing of the kind

    def __post_init__(self) -> None:
        """UserError: numbers that contradict each other."""
        for what, number, end in (
            ("rank", self.rank, self.processes),
            ("local rank", self.local_rank, self.per_node),
            ("node", self.node_rank, self.nodes),
            ("port", self.port, 65_536),
        ):
            if not 0 <= number < end:
                raise UserError(
                    f"{self.name}: {what} {number} of {end} is out of range; unset what another launcher left in the"
                    " environment"
                )

    @property
    def processes(self) -> int:
        return self.per_node * self.nodes


def launch() -> Launch | None:
    """What started this process beside others; None where it stands alone.

    UserError: part of the variables of a launcher, or such as contradict each other; nodes with different numbers of
    processes.
    """
    launched = _launched()
    return launched if launched is not None and launched.processes > 1 else None


def _launched() -> Launch | None:
    """The same, also of a launcher that has started one process alone."""
    found = {name: value for name, value in os.environ.items() if value}
    if _CHILD in found:
        return _child(found[_CHILD])
    if all(name in found for name in (*_PLACE, *_MEETING)):
        return _torchrun(found)
    launched = _srun(found)
    _refuse_remains(found, launched)
    return launched


def is_first_rank() -> bool:
    """False in the processes that a launcher, or the first of them, started beside the first one; they share its
    folder."""
    launched = launch()
    return launched is None or launched.rank == 0


def is_child() -> bool:
    """Whether the first process of the run has started this one."""
    launched = launch()
    return launched is not None and launched.name == _BY_ITSELF


@contextmanager
def ending_together() -> Iterator[None]:
    """Around a whole command: no process of a run is left waiting for another one that has ended.

    One that the first of them, torchrun or srun has started ends when that one does, however that was. The first of
    them and torchrun watch their own; srun would let the others wait: where the command fails it ends its step.
    """
    with suppress(UserError):  # which whoever asks next hears, too
        _end_with_parent()
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, SIGNALLED, INTERRUPTED):
            raise
        launched = None
        with suppress(UserError):
            launched = launch()
        if launched is None or launched.name != "srun" or shutil.which("scancel") is None:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        time.sleep(_FAREWELL)  # most have heard of it, and end with a line of their own
        subprocess.Popen(["scancel", "--signal=KILL", str(launched.id)])
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def local_rank() -> int:
    """The place of this process among those of its node that share a run, whoever started it."""
    launched = launch()
    return 0 if launched is None else launched.local_rank


def alone_with(processes: int) -> Launch:
    """What a process that nobody started says of itself and of those that it starts on this machine. UserError:
    MASTER_PORT is none."""
    return Launch(_BY_ITSELF, processes, 1, 0, 0, 0, LOOPBACK, _number(os.environ, "MASTER_PORT", 0), None)


def told_to_child(first: Launch, rank: int) -> dict[str, str]:
    """The variable that makes a process which this one starts the ``rank``-th beside the ``first``."""
    return {_CHILD: json.dumps({"rank": rank, "processes": first.processes, "port": first.port, "parent": os.getpid()})}


def dies_with(parent: int, number: int) -> Callable[[], None] | None:
    """What makes a child get signal ``number`` when ``parent`` ends; to be called in the child, before its program.
    None: not here."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, number)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare


def _end_with_parent() -> None:
    """Where that is a launcher, which may be killed without a word. Not on Windows, where a process does not hear of
    it."""
    launched, parent = _launched(), os.getppid()
    if launched is None or launched.name not in _WATCHED or os.name != "posix":
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        if (
            launched.name != _BY_ITSELF
        ):  # the others are there still: they save together, as they would had the launcher told them to end
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_TO_SAVE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _child(text: str) -> Launch:
    try:
        told = json.loads(text)
        rank, processes, port, parent = (int(told[name]) for name in ("rank", "processes", "port", "parent"))
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{_CHILD} = {text!r}: is set by a run for its own processes; unset it") from None
    if os.name == "posix" and parent != os.getppid():
        raise UserError(f"{_CHILD}: the process {parent} that set it did not start this one, or has ended; unset it")
    return Launch(_BY_ITSELF, processes, 1, rank, rank, 0, LOOPBACK, port, None)


def _torchrun(found: Mapping[str, str]) -> Launch:
    """From the variables that torchrun sets; other launchers set them, too."""
    rank, world, local, per_node = (_number(found, name) for name in _PLACE)
    run = found.get("TORCHELASTIC_RUN_ID")
    name = "RANK and WORLD_SIZE" if run is None else "torchrun"
    nodes = _number(found, "GROUP_WORLD_SIZE", max(1, world // max(1, per_node)))
    _refuse_uneven(name, world, nodes, per_node)
    node = _number(found, "GROUP_RANK", rank // per_node)
    return Launch(
        name,
        per_node,
        nodes,
        rank,
        local,
        node,
        found["MASTER_ADDR"],
        _number(found, "MASTER_PORT"),
        None if run == "none" else run,
    )


def _srun(found: Mapping[str, str]) -> Launch | None:
    """From the variables of a step of SLURM. (The script of a job is no step, but has the ranks of its first task:
    zeros.)"""
    if _number(found, "SLURM_STEP_NUM_TASKS", 1) == 1:
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
            if _number(found, name, 0):
                raise UserError(
                    f"{name} = {found[name]}, but SLURM_STEP_NUM_TASKS is"
                    f" {found.get('SLURM_STEP_NUM_TASKS', 'not set')}: srun did not start this process beside others;"
                    f" unset {name}"
                )
        return None
    if missing := [name for name in _STEP if name not in found]:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS = {found['SLURM_STEP_NUM_TASKS']}, but {_listed(missing)} not set: srun did not"
            " start this process; unset"
            f" {', '.join(name for name in _STEP if name in found and name != 'SLURM_JOB_ID')}"
        )
    world, rank, local, node, nodes = (_number(found, name) for name in _STEP[:5])
    per_node = world // max(1, nodes)
    _refuse_uneven("srun", world, nodes, per_node)
    job, number = _number(found, "SLURM_JOB_ID"), _number(found, "SLURM_STEP_ID")
    port = _PORTS[(31 * job + number) % len(_PORTS)]  # the steps of a job may run at once, and jobs share a node
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", found["SLURM_STEP_NODELIST"]).split(",")[0]  # n[01-03,7],m2 -> n01
    address = found.get("MASTER_ADDR", LOOPBACK if nodes == 1 else first)
    return Launch(
        "srun", per_node, nodes, rank, local, node, address, _number(found, "MASTER_PORT", port), f"{job}.{number}"
    )


def _refuse_remains(found: Mapping[str, str], launched: Launch | None) -> None:
    """UserError: some of torch's variables without the others. What a job's script derived from those of srun may
    stay."""
    if launched is None:
        numbers = ("0", "1", "0", "1") if "RANK" in found and "WORLD_SIZE" in found else (None,) * 4
    else:
        numbers = tuple(map(str, (launched.rank, launched.processes, launched.local_rank, launched.per_node)))
    node = "0" if launched is None else str(launched.node_rank)
    right = dict(zip((*_PLACE, *_NODE), (*numbers, node, node), strict=True))
    wrong = [name for name, value in right.items() if name in found and found[name] != value]
    if wrong:
        what = f"{wrong[0]} = {found[wrong[0]]}"
        if launched is not None:
            raise UserError(
                f"{what}: srun started this process as rank {launched.rank} of {launched.processes}; unset"
                f" {', '.join(wrong)}"
            )
        missing = [name for name in (*_PLACE, *_MEETING) if name not in found]
        raise UserError(
            f"{what}, but {_listed(missing)} not set: no launcher started this process; unset {', '.join(wrong)}"
        )
    for name, program in _OTHERS.items() if launched is None and "SLURM_STEP_ID" not in found else ():
        if _number(found, name, 1) > 1:
            raise UserError(
                f"{name} = {found[name]}: each process of {program} would train by itself; start them with torchrun or"
                " srun"
            )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"


def _number(found: Mapping[str, str], name: str, default: int | None = None) -> int:
    """UserError: the variable holds something else."""
    text = found.get(name) or (None if default is None else str(default))
    if text is None or not re.fullmatch(r"\d{1,18}", text):
        raise UserError(f"{name} = {text!r}: expected a number; unset it, or correct what sets it")
    return int(text)


def _refuse_uneven(name: str, world: int, nodes: int, per_node: int) -> None:
    if nodes < 1 or per_node < 1 or per_node * nodes != world:
        raise UserError(f"{name} started {world} processes on {nodes} nodes: legal is the same number on every node")


def folder_overrides(launched: Launch | None, given: Sequence[str]) -> list[str]:
    """Hydra overrides that give all processes of a launch one run folder, as the clock of each would name another.

    given: the other overrides. ConfigError: it has to be named.
    """
    if launched is None or value_of(given, "hydra.run.dir") is not None:
        return []
    if launched.id is None:
        raise ConfigError(
            f"hydra.run.dir: name the run's folder, as {launched.name} has no id for its processes (--standalone has)"
        )
    return [f"hydra.run.dir=outputs/{launched.name}-{launched.id}"]


def refuse_sweep(launched: Launch | None, given: Sequence[str]) -> None:
    """ConfigError: a sweep that cannot be run from here. given: its overrides."""
    if launched is not None:
        raise UserError(
            f"-m: each process of {launched.name} would run the whole sweep; trainer.devices=n starts n in each job"
        )
    hydra = value_of(given, "hydra/launcher") or ""
    if "slurm" in hydra and shutil.which("srun") is None:
        raise ConfigError(
            f"hydra/launcher={hydra}: there is no srun on this machine; start the sweep from a cluster's login node"
        )

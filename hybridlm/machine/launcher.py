"""Who started this process: nobody, a launcher with one process per device (torchrun, srun), or the first rank of its
run; and that the ranks of a run end together: none waits for one that has ended, and none outlives what started it.

Decided from the environment alone, and only from a launcher's complete set of variables: a few of them, left over from
something else, would make this process wait for ranks that do not exist. All other code asks here.
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

LOOPBACK = "127.0.0.1"
BY_FIRST_RANK = "trainer.devices"  # the name of a launch by the first rank
_CHILD = "HYBRIDLM_RANK"  # set by the first rank for those that it starts
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torch's variables, set together in every process
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_STEP = (  # of every task that srun starts
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
)
# The number of processes, as torch's variables and those of launchers that are not supported have it.
_WORLDS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")
_PORTS = range(15_000, 31_384)  # below those that systems give to outgoing connections


@dataclass(frozen=True)
class Launch:
    """The processes that were started together, and this one's ranks among them."""

    name: str  # torchrun, srun, RANK and WORLD_SIZE (another launcher), or trainer.devices (the first rank)
    per_node: int
    nodes: int
    rank: int  # among all processes
    local_rank: int  # among those of its node: also the index of its GPU
    node_rank: int
    address: str  # of the first rank, where all connect
    port: int  # 0: any free one
    id: str | None  # shared by all of them and unique to this launch; None: the launcher has none

    def __post_init__(self) -> None:
        """Raises UserError where the numbers contradict each other."""
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
    """The launch that this process belongs to; None: it is the only one.

    Raises UserError where a launcher's variables are incomplete or contradict each other, or where nodes have different
    numbers of processes.
    """
    launched = any_launch()
    return launched if launched is not None and launched.processes > 1 else None


def any_launch() -> Launch | None:
    """``launch``, also where a launcher has started only one process."""
    found = {name: value for name, value in os.environ.items() if value}
    if _CHILD in found:
        return _child(found[_CHILD])
    if all(name in found for name in (*_PLACE, *_MEETING)):
        return _torchrun(found)
    if _number(found, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _srun(found)
    for name in _WORLDS:
        if _number(found, name, 1) > 1 and ("SLURM_STEP_ID" not in found or name in _PLACE):
            missing = ", ".join(sorted({*_PLACE, *_MEETING} - found.keys()))
            raise UserError(
                f"{name} = {found[name]}, but {missing} not set: each process would train on its own; use torchrun or"
                f" srun, or unset {name}"
            )
    return None


def is_first_rank() -> bool:
    """False in the other ranks of a launch, which share the first one's run directory."""
    launched = launch()
    return launched is None or launched.rank == 0


def is_child() -> bool:
    """Whether the first rank of the run has started this process."""
    launched = launch()
    return launched is not None and launched.name == BY_FIRST_RANK


def local_rank() -> int:
    """The rank of this process among those of its node, whoever started it."""
    launched = launch()
    return 0 if launched is None else launched.local_rank


def alone_with(processes: int) -> Launch:
    """The launch of a process that no launcher started, as the first of ``processes`` on this machine. Raises UserError
    where MASTER_PORT is not a port."""
    return Launch(BY_FIRST_RANK, processes, 1, 0, 0, 0, LOOPBACK, _number(os.environ, "MASTER_PORT", 0), None)


def child_environment(first: Launch, rank: int) -> dict[str, str]:
    """The variable that makes a process started by this one rank ``rank`` of the launch of ``first``."""
    return {_CHILD: json.dumps({"rank": rank, "processes": first.processes, "port": first.port, "parent": os.getpid()})}


def _child(text: str) -> Launch:
    try:
        fields = json.loads(text)
        rank, processes, port, parent = (int(fields[name]) for name in ("rank", "processes", "port", "parent"))
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{_CHILD} = {text!r}: only a run sets it, for its own processes; unset it") from None
    if os.name == "posix" and parent != os.getppid():
        raise UserError(f"{_CHILD}: process {parent}, which set it, is not the parent of this one; unset it")
    return Launch(BY_FIRST_RANK, processes, 1, rank, rank, 0, LOOPBACK, port, None)


def _torchrun(found: Mapping[str, str]) -> Launch:
    """From torchrun's variables, which other launchers set as well."""
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


def _srun(found: Mapping[str, str]) -> Launch:
    """From the variables of a SLURM step. (A job's batch script is not a step but has the ranks of its first task, all
    zero.)"""
    if missing := [name for name in _STEP if name not in found]:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS = {found['SLURM_STEP_NUM_TASKS']}, but {', '.join(missing)} not set: srun did not"
            " start this process; unset SLURM_STEP_NUM_TASKS"
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


def _number(found: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Raises UserError where the variable is not a number."""
    text = found.get(name) or (None if default is None else str(default))
    if text is None or not re.fullmatch(r"\d{1,18}", text):
        raise UserError(f"{name} = {text!r}: expected a number; unset it, or correct what sets it")
    return int(text)


def _refuse_uneven(name: str, world: int, nodes: int, per_node: int) -> None:
    if nodes < 1 or per_node < 1 or per_node * nodes != world:
        raise UserError(f"{name} started {world} processes on {nodes} nodes: every node needs the same number")


def folder_overrides(launched: Launch | None, given: Sequence[str]) -> list[str]:
    """Hydra overrides that give all ranks of a launch the same run directory: named by the clock, theirs would differ.

    given: the other overrides. Raises ConfigError where the user has to name the directory.
    """
    if launched is None or value_of(given, "hydra.run.dir") is not None:
        return []
    if launched.id is None:
        raise ConfigError(
            f"hydra.run.dir: set it, as {launched.name} gives its processes no id to name the run directory by"
            " (torchrun --standalone does)"
        )
    return [f"hydra.run.dir=outputs/{launched.name}-{launched.id}"]


def refuse_sweep(launched: Launch | None) -> None:
    """Raises UserError for a sweep that a launcher has started."""
    if launched is not None:
        raise UserError(
            f"-m: each process of {launched.name} would run the whole sweep; use trainer.devices=n for n processes per"
            " job"
        )


SIGNALLED = 143  # exit code of a process ended by SIGTERM, as a shell reports it
INTERRUPTED = 130  # by Ctrl-C
_WATCHED = (BY_FIRST_RANK, "torchrun", "srun")  # launchers that live as long as the processes they start
_LOOK_EVERY, _GRACE, _TO_SAVE = 0.2, 3.0, 30.0  # seconds
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@contextmanager
def ending_together() -> Iterator[None]:
    """Around a whole command: no rank of a run is left waiting for one that has ended.

    A rank that was started by the first one, torchrun or srun ends when its parent does, for whatever reason. The first
    rank and torchrun watch their children; srun does not, so a failing command ends its step.
    """
    launched = None
    with suppress(UserError):  # raised again when the launch is needed
        launched = any_launch()
    if launched is not None and launched.name in _WATCHED and os.name == "posix":  # on Windows nobody knows its parent
        threading.Thread(target=_end_with, args=(os.getppid(), launched.name == BY_FIRST_RANK), daemon=True).start()
    try:
        yield
    except (Exception, SystemExit) as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if (
            code in (None, 0, SIGNALLED, INTERRUPTED)
            or launched is None
            or (launched.name, launched.processes > 1) != ("srun", True)
            or shutil.which("scancel") is None
        ):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        time.sleep(_GRACE)  # most have noticed by then, and end with a line of their own
        subprocess.Popen(["scancel", "--signal=KILL", str(launched.id)])
        os._exit(code if isinstance(code, int) else 1)


def dies_with(parent: int, number: int) -> Callable[[], None] | None:
    """A ``preexec_fn`` with which a child gets signal ``number`` when ``parent`` ends. None: only Linux can do that."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, number)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare


def _end_with(parent: int, child: bool) -> None:
    """Ends this process with its parent, which may be killed without notice. child: of the first rank of the run."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    if not child:  # the other ranks are still alive: all save together, as after a SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_TO_SAVE)
    os._exit(1)

"""The processes of one run: Lightning's view of them, how they are started where nobody has, how they meet, and that
they end together.

Lightning would look the environment up by itself, start processes with this one's arguments (in a sweep those are the
whole sweep's), and leave a process behind where another one dies. Here `launcher.launch` has decided, and no process
outlives the run by more than a moment: the first one watches those that it has started, they watch it, and torchrun and
srun watch theirs.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from hybridlm.errors import RunFailed, UserError
from hybridlm.machine.description import Machine
from hybridlm.machine.device import CPU
from hybridlm.machine.launcher import Launch, alone_with, child_environment, is_child, launch
from hybridlm.machine.lifetime import dies_with
from hybridlm.train.launch import this_job

_LOOK_EVERY = 0.2  # seconds
_GRACE = 5.0  # seconds for a process to end by itself once another one has
_PATIENCE = 600.0  # seconds for all processes to come; they read, and perhaps prepare, the data before
# What gloo, NCCL and torch's store say where the other end of a connection is not there any more.
_GONE = re.compile(
    r"gloo/transport|onnection (was )?(closed|reset)|Broken pipe|remote process exited|communicator was aborted"
)


class Ranks(ClusterEnvironment):
    """What Lightning is told of the processes of a run."""

    def __init__(self, launched: Launch) -> None:
        super().__init__()
        self.launched = launched

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.launched.address

    @property
    def main_port(self) -> int:
        return self.launched.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.launched.processes

    def set_world_size(self, size: int) -> None:
        assert size == self.launched.processes

    def global_rank(self) -> int:
        return self.launched.rank

    def set_global_rank(self, rank: int) -> None:
        """Lightning counts through the nodes; the tasks of srun may be dealt out in another way."""

    def local_rank(self) -> int:
        return self.launched.local_rank

    def node_rank(self) -> int:
        return self.launched.node_rank


def ranks(machine: Machine) -> Launch:
    """The processes of a run on ``machine``."""
    return launch() or alone_with(machine.devices)


def refuse_taken_port(machine: Machine) -> None:
    """UserError: the processes of a run on ``machine`` cannot meet where they are to. To be asked before anything is
    written."""
    ours = ranks(machine)
    if ours.processes == 1 or ours.rank != 0 or ours.port == 0 or ours.name == "torchrun":
        return
    try:
        socket.create_server(("", ours.port)).close()
    except OSError as error:
        raise UserError(_no_meeting(ours, error)) from error


@contextmanager
def together(machine: Machine, verb: Sequence[str]) -> Iterator[None]:
    """In it all processes of a run are there and in one process group. ``verb``: the words between the program's name
    and the overrides.

    UserError: the port is taken. RunFailed: another process of the run has failed, or does not come.
    """
    ours = ranks(machine)
    if ours.processes == 1:
        yield
        return
    children: list[subprocess.Popen[bytes]] = []
    over = threading.Event()
    try:
        try:
            if ours.name == "torchrun":  # there Lightning does the rest
                _reach_agent(ours)
            else:
                store = _store(ours) if ours.rank == 0 else None
                if launch() is None:
                    assert store is not None
                    children = _started(ours, store.port, verb)
                    threading.Thread(target=_watch, args=(children, over), daemon=True).start()
                _meet(ours, machine, store)
            yield
        except RuntimeError as error:
            if (reason := _lost(error, children)) is not None:
                raise RunFailed(reason) from error
            raise
        except SystemExit:
            _await(children)
            raise
        _await(children)
    finally:
        over.set()
        for child in children:
            child.kill()
            child.wait()
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(ours: Launch) -> dist.TCPStore:
    """Where the processes meet, in the first of them."""
    try:
        return dist.TCPStore(
            ours.address, ours.port, None, True, timeout=timedelta(seconds=_PATIENCE), wait_for_workers=False
        )
    except RuntimeError as error:
        raise UserError(_no_meeting(ours, error)) from error


def _reach_agent(ours: Launch) -> None:
    """RunFailed: torchrun, whose agent holds the store before it starts a process, has ended; Lightning would wait for
    half an hour."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    try:
        socket.create_connection((ours.address, ours.port), timeout=_GRACE).close()
    except OSError as error:
        raise RunFailed(f"{ours.name} does not answer at {ours.address}:{ours.port} ({_first_line(error)})") from error


def _no_meeting(ours: Launch, error: Exception) -> str:
    source = "MASTER_PORT" if "MASTER_PORT" in os.environ else "the port of this step of the job"
    return (
        f"{source} = {ours.port}: the processes cannot meet there ({_first_line(error)}); MASTER_PORT names another"
        " port, a free one"
    )


def _meet(ours: Launch, machine: Machine, store: dist.TCPStore | None) -> None:
    """Waits for all, in turns short enough for signals to be heard, and makes the process group."""
    deadline = time.monotonic() + _PATIENCE
    where = f"{ours.address}:{ours.port}"
    while store is None:
        try:
            socket.create_connection((ours.address, ours.port), timeout=1).close()
            store = dist.TCPStore(
                ours.address, ours.port, None, False, timeout=timedelta(seconds=_GRACE), wait_for_workers=False
            )
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"the first of the {ours.processes} processes does not answer at {where} ({_first_line(error)})"
                ) from error
            time.sleep(_LOOK_EVERY)
    try:
        store.add("here", 1)
        while (here := store.add("here", 0)) < ours.processes:
            if time.monotonic() > deadline:
                raise RunFailed(f"only {here} of {ours.processes} processes have come to {where}")
            time.sleep(_LOOK_EVERY / 4)
    except RuntimeError as error:
        raise RunFailed(
            f"the first of the {ours.processes} processes, at {where}, has ended ({_first_line(error)})"
        ) from error
    dist.init_process_group(
        dist.Backend.default_device_backend_map[machine.device],
        store=dist.PrefixStore("run", store),
        rank=ours.rank,
        world_size=ours.processes,
        timeout=dist.default_pg_timeout,  # what one rank may do alone, writing a checkpoint to a slow disk, takes long
        device_id=None if machine.device == CPU else torch.device(machine.device, ours.local_rank),
    )


def _started(ours: Launch, port: int, verb: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """The other processes of the run: this very job of Hydra in this very folder, whatever started this process."""
    command, folder = this_job(verb)
    started = []
    for rank in range(1, ours.processes):
        environment = {**os.environ, **child_environment(replace(ours, port=port), rank)}
        arguments = [*command, f"hydra.job.name=train_rank_{rank}"]  # which names its log
        ends = dies_with(os.getpid(), signal.SIGKILL)  # also in the seconds before it could notice by itself
        started.append(
            subprocess.Popen(arguments, env=environment, cwd=folder, stdin=subprocess.DEVNULL, preexec_fn=ends)
        )
    return started


def _watch(children: Sequence[subprocess.Popen[bytes]], over: threading.Event) -> None:
    """Ends this process where another one has failed and this one has not noticed: it may wait for it for ever."""
    while not over.wait(_LOOK_EVERY):
        if (reason := _failure(children)) is not None:
            if over.wait(_GRACE):
                return
            print(f"error: {reason}", file=sys.stderr, flush=True)
            for child in children:
                child.kill()
            os._exit(1)


def _failure(children: Sequence[subprocess.Popen[bytes]]) -> str | None:
    """What became of the first of the other processes that has failed."""
    for rank, child in enumerate(children, 1):
        if code := child.poll():
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"process {rank + 1} of {len(children) + 1} of this run {how}"
    return None


def _lost(error: RuntimeError, children: Sequence[subprocess.Popen[bytes]]) -> str | None:
    """The reason where ``error`` is only that another process of the run is not there any more."""
    if _GONE.search(str(error)) is None:
        return None
    deadline = time.monotonic() + (_GRACE if children or is_child() else 0)
    while time.monotonic() < deadline:  # the connection goes before the process does
        if (reason := _failure(children)) is not None:
            return reason
        time.sleep(_LOOK_EVERY / 4)
    return f"another process of this run has ended ({_first_line(error)})"


def _await(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Gives the other processes the time to end as this one does."""
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_GRACE)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]

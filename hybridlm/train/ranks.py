"""The processes of one run: what Lightning is told about them, how they are started without a launcher, how they
rendezvous, and that they end together.

Lightning would inspect the environment itself, start processes with this one's arguments (in a sweep, the whole
sweep's), and leave processes behind when one dies. Here `launcher.launch` decides, and no process outlives the run by
more than seconds: the first one watches those that it has started, they watch it, and torchrun and srun watch theirs.
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
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from hybridlm.errors import RunFailed, UserError
from hybridlm.machine.description import Machine
from hybridlm.machine.device import CPU
from hybridlm.machine.launcher import Launch, alone_with, child_environment, is_child, launch
from hybridlm.machine.lifetime import dies_with
from hybridlm.train.launch import this_job

_LOOK_EVERY = 0.2  # seconds
_GRACE = 5.0  # seconds for a process to exit by itself once another one has
_PATIENCE = 600.0  # seconds for all processes to connect; they read, and perhaps prepare, the data before
# Errors of gloo, NCCL and torch's store when the other end of a connection is gone.
_GONE = re.compile(
    r"gloo/transport|onnection (was )?(closed|reset)|Broken pipe|remote process exited|communicator was aborted"
)


class Ranks(ClusterEnvironment):
    """What Lightning is told about the processes of a run."""

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
        """Ignored: Lightning numbers ranks node by node, srun may distribute its tasks in another way."""

    def local_rank(self) -> int:
        return self.launched.local_rank

    def node_rank(self) -> int:
        return self.launched.node_rank


def ranks(machine: Machine) -> Launch:
    """The processes of a run on ``machine``."""
    return launch() or alone_with(machine.devices)


def refuse_taken_port(machine: Machine) -> None:
    """UserError: the processes of a run on ``machine`` cannot rendezvous at their port. Called before anything is
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
    """Within it all processes of a run are up and in one process group. ``verb``: the words between the program's name
    and the overrides.

    UserError: the port is taken. RunFailed: another process of the run has failed or does not connect.
    """
    ours = ranks(machine)
    if ours.processes == 1:
        yield
        return
    children: list[subprocess.Popen[bytes]] = []
    over = threading.Event()
    try:
        try:
            if ours.name == "torchrun":  # Lightning does the rest
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


def _store(ours: Launch) -> TCPStore:
    """The rendezvous store, in the first process."""
    try:
        return TCPStore(
            ours.address, ours.port, None, True, timeout=timedelta(seconds=_PATIENCE), wait_for_workers=False
        )
    except RuntimeError as error:
        raise UserError(_no_meeting(ours, error)) from error


def _reach_agent(ours: Launch) -> None:
    """RunFailed: torchrun, whose agent serves the store before it starts a process, has exited; Lightning would wait
    for half an hour."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    try:
        socket.create_connection((ours.address, ours.port), timeout=_GRACE).close()
    except OSError as error:
        raise RunFailed(f"{ours.name} does not answer at {ours.address}:{ours.port} ({_first_line(error)})") from error


def _no_meeting(ours: Launch, error: Exception) -> str:
    source = "MASTER_PORT" if "MASTER_PORT" in os.environ else "the port of this step of the job"
    return (
        f"{source} = {ours.port}: the processes cannot connect there ({_first_line(error)}); set MASTER_PORT to a free"
        " port"
    )


def _meet(ours: Launch, machine: Machine, store: TCPStore | None) -> None:
    """Waits for all, polling so that signals are handled, and creates the process group."""
    deadline = time.monotonic() + _PATIENCE
    where = f"{ours.address}:{ours.port}"
    while store is None:
        try:
            socket.create_connection((ours.address, ours.port), timeout=1).close()
            store = TCPStore(
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
                raise RunFailed(f"only {here} of {ours.processes} processes have connected to {where}")
            time.sleep(_LOOK_EVERY / 4)
    except RuntimeError as error:
        raise RunFailed(
            f"the first of the {ours.processes} processes, at {where}, has exited ({_first_line(error)})"
        ) from error
    dist.init_process_group(
        dist.Backend.default_device_backend_map[machine.device],
        store=PrefixStore("run", store),
        rank=ours.rank,
        world_size=ours.processes,
        timeout=dist.default_pg_timeout,  # long: one rank may write a checkpoint to a slow disk alone
        device_id=None if machine.device == CPU else torch.device(machine.device, ours.local_rank),
    )


def _started(ours: Launch, port: int, verb: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Starts the other processes of the run: the same Hydra job in the same folder, whatever started this process."""
    command, folder = this_job(verb)
    started = []
    for rank in range(1, ours.processes):
        environment = {**os.environ, **child_environment(replace(ours, port=port), rank)}
        arguments = [*command, f"hydra.job.name=train_rank_{rank}"]  # names its log
        ends = dies_with(os.getpid(), signal.SIGKILL)  # also in the seconds before it could notice
        started.append(
            subprocess.Popen(arguments, env=environment, cwd=folder, stdin=subprocess.DEVNULL, preexec_fn=ends)
        )
    return started


def _watch(children: Sequence[subprocess.Popen[bytes]], over: threading.Event) -> None:
    """Ends this process if another one has failed and this one has not noticed: it might wait forever."""
    while not over.wait(_LOOK_EVERY):
        if (reason := _failure(children)) is not None:
            if over.wait(_GRACE):
                return
            print(f"error: {reason}", file=sys.stderr, flush=True)
            for child in children:
                child.kill()
            os._exit(1)


def _failure(children: Sequence[subprocess.Popen[bytes]]) -> str | None:
    """How the first of the other processes that failed has ended."""
    for rank, child in enumerate(children, 1):
        if code := child.poll():
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            return f"process {rank + 1} of {len(children) + 1} of this run {how}"
    return None


def _lost(error: RuntimeError, children: Sequence[subprocess.Popen[bytes]]) -> str | None:
    """The reason if ``error`` only means that another process of the run is gone."""
    if _GONE.search(str(error)) is None:
        return None
    deadline = time.monotonic() + (_GRACE if children or is_child() else 0)
    while time.monotonic() < deadline:  # the connection is closed before the process exits
        if (reason := _failure(children)) is not None:
            return reason
        time.sleep(_LOOK_EVERY / 4)
    return f"another process of this run has exited ({_first_line(error)})"


def _await(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Gives the other processes time to exit."""
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_GRACE)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]

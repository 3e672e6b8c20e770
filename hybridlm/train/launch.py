"""Lightning's strategy, and what Hydra knows about this run: its sweep, and the command that repeats the job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import ModelParallelStrategy

from hybridlm.config.overrides import quoted
from hybridlm.errors import ConfigError, RunFailed, UserError
from hybridlm.machine.description import Machine
from hybridlm.machine.launcher import Launch, alone_with, child_environment, dies_with, is_child, launch


def strategy(name: str, machine: Machine) -> Any:
    """The Lightning strategy of ``trainer.strategy``."""
    if name == "fsdp2" and machine.devices < 2:
        raise ConfigError("trainer.strategy = 'fsdp2': shards over at least two devices; set trainer.devices")
    if name == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=machine.devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "ddp" if machine.devices > 1 else "auto"


def sweep_name() -> str | None:
    """The name of the folder of the sweep that this run is a job of, or None."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name


def this_job(verb: Sequence[str]) -> tuple[list[str], str]:
    """The command and the working directory of another process of this run, which finds what was decided in an
    environment variable: the overrides are for whoever lists processes.

    ``verb``: the words between the program's name and the overrides.
    """
    if not HydraConfig.initialized():
        raise ConfigError("trainer.devices: several only in a run that train.py or hybridlm train has started")
    hydra, spec = HydraConfig.get(), sys.modules["__main__"].__spec__
    program = ["-m", "hybridlm", "train"]  # not what this one runs, if submitit or joblib has started it
    if spec is None:
        program = [os.path.abspath(sys.argv[0]), *verb]
    elif spec.name.startswith("hybridlm"):
        program = ["-m", spec.name, *verb]
    safe = ["-P"] if sys.flags.safe_path else []  # as a sweep starts its jobs: not importing from the folder
    folder = f"hydra.run.dir={quoted(Path(hydra.runtime.output_dir))}"
    return [sys.executable, *safe, *program, *hydra.overrides.task, folder], str(hydra.runtime.cwd)


_LOOK_EVERY = 0.2  # seconds
_GRACE = 5.0  # seconds for a process to exit by itself once another one has
# Errors of gloo, NCCL and torch's store when the other end of a connection is gone.
_GONE = re.compile(
    r"gloo/transport|onnection (was )?(closed|reset)|Broken pipe|remote process exited|communicator was aborted"
)


class Ranks(ClusterEnvironment):
    """What Lightning is told about the processes of a run."""

    creates_processes_externally = True

    def __init__(self, launched: Launch) -> None:
        self.launched = launched

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
    """The processes of a run on ``machine``; those that this one is to start meet at a free port, or at MASTER_PORT."""
    ours = launch() or alone_with(machine.devices)
    return ours if ours.port or ours.processes == 1 else replace(ours, port=find_free_network_port())


@contextmanager
def together(ours: Launch, verb: Sequence[str]) -> Iterator[None]:
    """Within it the other processes of a run are started if nobody else has, and watched. ``verb``: the words between
    the program's name and the overrides.

    UserError: their port is taken. RunFailed: another process of the run has failed.
    """
    meeting = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}  # which Lightning sets
    children: list[subprocess.Popen[bytes]] = []
    over = threading.Event()
    try:
        if ours.processes > 1 and launch() is None:
            children = _started(ours, verb)
            threading.Thread(target=_watch, args=(children, over), daemon=True).start()
        yield
        _await(children)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {ours.port} is in use; set MASTER_PORT to a free one") from error
        if (reason := _lost(error, children)) is None:
            raise
        raise RunFailed(reason) from error
    except SystemExit:
        _await(children)
        raise
    finally:
        over.set()
        for child in children:
            child.kill()
            child.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in meeting.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def _started(ours: Launch, verb: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Starts the other processes of the run: the same Hydra job in the same folder, whatever started this process."""
    command, folder = this_job(verb)
    return [
        subprocess.Popen(
            [*command, f"hydra.job.name=train_rank_{rank}"],  # names its log
            env={**os.environ, **child_environment(ours, rank)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            preexec_fn=dies_with(os.getpid(), signal.SIGKILL),  # also in the seconds before it could notice
        )
        for rank in range(1, ours.processes)
    ]


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

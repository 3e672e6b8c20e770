"""Who started this process: nobody, or a launcher that starts one for each device (torchrun, srun). Reads the environment alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from hybridlm.command_line import value_of
from hybridlm.errors import ConfigError, UserError


@dataclass(frozen=True)
class Launch:
    """The processes that a launcher has started together."""

    name: str  # torchrun or srun
    per_node: int
    nodes: int
    rank: int  # of this process among all
    id: str | None  # the same in all of them, and another the next time; None: there is nothing of the kind

    @property
    def processes(self) -> int:
        return self.per_node * self.nodes


def launch() -> Launch | None:
    """What a launcher says; None where this process stands alone, or was started by Lightning beside another one.

    ConfigError: nodes with different numbers of processes.
    """
    found = os.environ
    if "TORCHELASTIC_RUN_ID" in found:
        run, world, local = found["TORCHELASTIC_RUN_ID"], int(found["WORLD_SIZE"]), int(found["LOCAL_WORLD_SIZE"])
        name, nodes, rank, key = "torchrun", int(found.get("GROUP_WORLD_SIZE", 1)), int(found["RANK"]), None if run == "none" else run
    elif int(found.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun, and not the script of a job with several tasks
        world, nodes, rank = int(found["SLURM_STEP_NUM_TASKS"]), int(found.get("SLURM_STEP_NUM_NODES", 1)), int(found["SLURM_PROCID"])
        name, local, key = "srun", world // nodes, f"{found['SLURM_JOB_ID']}.{found.get('SLURM_STEP_ID', 0)}"
    else:
        return None
    if local * nodes != world:
        raise UserError(f"{name} started {world} processes on {nodes} nodes: legal is the same number on every node")
    return Launch(name, local, nodes, rank, key) if world > 1 else None


def is_first_rank() -> bool:
    """False in the processes that a launcher, or Lightning, starts beside the first one; they share its folder."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"))


def local_rank() -> int:
    """The place of this process among those of its node that share a run, whoever started it: also its GPU's."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def folder_overrides(launched: Launch | None, given: Sequence[str]) -> list[str]:
    """Hydra overrides that give all processes of a launch one run folder, as the clock of each would name another.

    given: the other overrides. Only the first process writes Hydra's notes into the folder. ConfigError: it has to be named.
    """
    if launched is None:
        return []
    more = []
    if value_of(given, "hydra.run.dir") is None:
        if launched.id is None:
            raise ConfigError(f"hydra.run.dir: name the run's folder, as {launched.name} has no id for its processes (--standalone has)")
        more.append(f"hydra.run.dir=outputs/{launched.name}-{launched.id}")
    return more + (["hydra.output_subdir=null"] if launched.rank else [])


def refuse_sweep(launched: Launch | None, given: Sequence[str]) -> None:
    """ConfigError: a sweep that cannot be run from here. given: its overrides."""
    if launched is not None:
        raise UserError(f"-m: each process of {launched.name} would run the whole sweep; trainer.devices=n starts n in each job")
    hydra = value_of(given, "hydra/launcher") or ""
    if "slurm" in hydra and shutil.which("srun") is None:
        raise ConfigError(f"hydra/launcher={hydra}: there is no srun on this machine; start the sweep from a cluster's login node")

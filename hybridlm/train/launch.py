"""Lightning's strategy, and what Hydra knows about this run: its sweep, and the command that repeats the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.config.overrides import quoted
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm.machine.description import Machine


def strategy(name: str, machine: Machine) -> Any:
    """The Lightning strategy of ``trainer.strategy``."""
    if name == "fsdp2":
        if machine.devices < 2:
            raise ConfigError("trainer.strategy = 'fsdp2': shards over at least two devices; set trainer.devices")
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(
            data_parallel_size=machine.devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "ddp" if machine.devices > 1 else "auto"


def sweep_name() -> str | None:
    """The name of the folder of the sweep that this run is a job of, or None."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name


def this_job(verb: Sequence[str]) -> tuple[list[str], str]:
    """The command and the working directory of another process of this run, which finds what was decided in an
    environment variable: the overrides are for whoever lists processes.

    ``verb``: the words between the program's name and the overrides.
    """
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        raise ConfigError("trainer.devices: several only in a run that train.py or hybridlm train has started")
    hydra, spec = HydraConfig.get(), sys.modules["__main__"].__spec__
    if spec is None:
        program = [os.path.abspath(sys.argv[0]), *verb]
    elif spec.name.startswith("hybridlm"):
        program = ["-m", spec.name, *verb]
    else:  # a process of submitit or joblib, which another one is not to repeat
        program = ["-m", "hybridlm", "train"]
    folder = Path(hydra.runtime.output_dir)
    safe = (
        ["-P"] if sys.flags.safe_path else []
    )  # as a sweep starts its jobs: in a folder that is not to be imported from
    return [sys.executable, *safe, *program, *hydra.overrides.task, f"hydra.run.dir={quoted(folder)}"], str(
        hydra.runtime.cwd
    )

"""Lightning's strategy, and the way its extra processes start again inside Hydra."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm.hardware.machine import Machine

# What Lightning leaves behind in the environment after a launch; the next job of a sweep would take itself for a child of it.
_LEFT_BEHIND = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def strategy(name: str, machine: Machine) -> Any:
    """The Lightning strategy of ``trainer.strategy``."""
    if name == "fsdp2":
        if machine.devices < 2:
            raise ConfigError("trainer.strategy = 'fsdp2': shards over at least two devices; set trainer.devices")
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(data_parallel_size=machine.devices, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return "ddp" if machine.devices > 1 else "auto"


def sweep_name() -> str | None:
    """The name of the folder of the sweep that this run is a job of, or None."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name


@contextmanager
def relaunchable(verb: Sequence[str]) -> Iterator[None]:
    """Makes ``sys.argv`` and Hydra's configuration such that Lightning's child processes run this very job.

    Lightning starts children with this process' arguments. In a sweep those are the whole sweep's, and each child would begin a sweep of
    its own; from the console script they must keep the verb. Afterwards everything is put back, so that the next job starts clean.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import read_write

    if not HydraConfig.initialized():
        yield
        return
    hydra = HydraConfig.get()
    main = sys.modules["__main__"]
    argv, spec, environment = list(sys.argv), main.__spec__, {name: os.environ.get(name) for name in _LEFT_BEHIND}
    root = HydraConfig.instance().cfg
    assert root is not None
    before = root.hydra.run.dir
    try:
        sys.argv = [argv[0], *verb, *hydra.overrides.task]
        if spec is not None and not spec.name.startswith("hybridlm"):  # in a process of submitit or joblib, which a child is not to repeat
            main.__spec__ = importlib.util.find_spec("hybridlm.__main__")
            sys.argv = [argv[0], "train", *hydra.overrides.task]
        with read_write(root.hydra.run):
            root.hydra.run.dir = hydra.runtime.output_dir
        yield
    finally:
        sys.argv, main.__spec__ = argv, spec
        with read_write(root.hydra.run):
            root.hydra.run.dir = before
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

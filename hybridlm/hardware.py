"""The machine a run uses: device, precision, and the numbers that follow from them. The only file with device names in it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridlm.config.section import ConfigError
from hybridlm.launcher import Launch, launch

if TYPE_CHECKING:
    import torch

    from hybridlm.config.run import RunConfig

CPU, CUDA = "cpu", "cuda"


@dataclass(frozen=True)
class Machine:
    """What ``auto`` came to. global_batch = batch_size x accumulate x devices, in windows."""

    device: str  # cpu or cuda
    device_name: str
    devices: int  # processes, over all nodes
    nodes: int
    precision: str
    max_steps: int
    global_batch: int
    batch_size: int
    accumulate: int
    peak_flops: float | None  # of all devices together, per second; None: unknown


def resolve_machine(config: RunConfig) -> Machine:
    """Chooses device, precision and batch sizes on this machine. ConfigError: the profile asks for what is not here, or numbers clash."""
    import torch

    hardware, trainer = config.hardware, config.trainer
    found = torch.cuda.is_available()
    refuse_missing_gpu(config, found)
    device = CUDA if found and hardware.accelerator != CPU else CPU
    available = torch.cuda.device_count() if device == CUDA else None
    per_node, nodes = _processes(trainer.devices, available, launch())
    devices = per_node * nodes
    if device == CUDA:
        _limit_memory(hardware.memory_gb)
    budget = hardware.cuda if device == CUDA else hardware.cpu
    global_batch = budget.global_batch if config.data.global_batch == "auto" else config.data.global_batch
    batch_size, accumulate = _split_batch(global_batch, devices, config.data.batch_size, trainer.accumulate)
    return Machine(
        device=device,
        device_name=torch.cuda.get_device_name() if device == CUDA else f"CPU, {trainer.threads or torch.get_num_threads()} threads",
        devices=devices,
        nodes=nodes,
        precision=_precision(config, device),
        max_steps=budget.max_steps if trainer.max_steps == "auto" else trainer.max_steps,
        global_batch=global_batch,
        batch_size=batch_size,
        accumulate=accumulate,
        peak_flops=None if hardware.peak_tflops is None else hardware.peak_tflops * 1e12 * devices,
    )


def _processes(asked: int | str, available: int | None, launched: Launch | None) -> tuple[int, int]:
    """(processes per node, nodes). available: devices of this node, None on a CPU, where any number of processes may run."""
    if launched is not None:
        if isinstance(asked, int) and asked != launched.per_node:
            raise ConfigError(f"trainer.devices = {asked}: {launched.name} started {launched.per_node} processes per node; leave it auto")
        asked = launched.per_node
    per_node = asked if isinstance(asked, int) else available or 1
    if available is not None and per_node > available:
        raise ConfigError(f"trainer.devices = {per_node}: this machine has {available}")
    return per_node, 1 if launched is None else launched.nodes


def _split_batch(global_batch: int, devices: int, batch_size: int | str, accumulate: int | str) -> tuple[int, int]:
    """(batch_size, accumulate) with batch_size x accumulate x devices = global_batch."""
    if not isinstance(batch_size, int):
        parts = devices * (accumulate if isinstance(accumulate, int) else 1)
        batch_size = global_batch // parts
        accumulate = accumulate if isinstance(accumulate, int) else 1
    elif not isinstance(accumulate, int):
        accumulate = max(1, global_batch // (batch_size * devices))
    if batch_size * accumulate * devices != global_batch:
        raise ConfigError(
            f"data.global_batch = {global_batch}: not data.batch_size x trainer.accumulate x devices = "
            f"{batch_size} x {accumulate} x {devices} = {batch_size * accumulate * devices}"
        )
    return batch_size, accumulate


def _precision(config: RunConfig, device: str) -> str:
    import torch

    wanted = config.trainer.precision
    if wanted == "auto":
        if device == CPU:
            return "32-true"  # bfloat16 is not faster on most CPUs
        return "bf16-mixed" if config.hardware.bf16 and torch.cuda.is_bf16_supported() else "16-mixed"
    if wanted == "16-mixed" and device == CPU:
        raise ConfigError(
            "trainer.precision = '16-mixed': a CPU has no loss-scaled float16 training; legal here: 32-true, bf16-mixed, bf16-true"
        )
    if wanted in ("bf16-mixed", "bf16-true") and device == CUDA and not config.hardware.bf16:
        raise ConfigError(f"trainer.precision = {wanted!r}: hardware {config.hardware.name} has no bfloat16; legal here: 32-true, 16-mixed")
    return wanted


def _limit_memory(memory_gb: float | None) -> None:
    """Holds the run to the profile's memory, so that what fits here also fits the card it was planned for."""
    import torch

    if memory_gb is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 2**30 / total))


def inference_device() -> torch.device:
    """Where a trained model is loaded to generate: the GPU if there is one."""
    import torch

    return torch.device(CUDA if torch.cuda.is_available() else CPU)


def peak_memory_gb(device: torch.device) -> float | None:
    """The most memory this process has held so far, GiB: torch's on a GPU, else all of it; None where the system does not say."""
    import torch

    if device.type == CUDA:
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name for one process: its own entries where it is set, else the numbers of all GPUs."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named is not None else [str(i) for i in range(count)]


def refuse_missing_gpu(config: RunConfig, found: bool) -> None:
    """ConfigError: the profile is for a CUDA device, and there is none."""
    if config.hardware.accelerator == CUDA and not found:
        raise ConfigError(
            f"hardware = {config.hardware.name}: needs a CUDA device and this machine has none; train with hardware=auto or hardware=cpu "
            "(--cfg job works anywhere)"
        )

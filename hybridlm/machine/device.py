"""The device that is here: its facts, its memory, and the names of devices."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU, CUDA = "cpu", "cuda"
BF16_SINCE = 8.0  # compute capability; older cards do it in software


@dataclass(frozen=True)
class DeviceFacts:
    """A device, the one that is here or the one that a profile describes. None: not known, or a CPU has nothing of the
    kind."""

    kind: str  # cpu or cuda
    name: str  # the driver's
    memory_gb: float | None  # GiB
    capability: str | None  # "8.6"
    shared_memory_kb: int | None  # the most that one block of a kernel may have
    bf16: bool  # in hardware


def device_facts() -> DeviceFacts:
    """Of the current CUDA device, or of the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return cpu_facts()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    shared = getattr(properties, "shared_memory_per_block_optin", None)  # AMD's build of torch has no such property
    return DeviceFacts(
        kind=CUDA,
        name=torch.cuda.get_device_name(),
        memory_gb=properties.total_memory / 2**30,
        capability=f"{properties.major}.{properties.minor}",
        shared_memory_kb=None if shared is None else shared // 1024,
        bf16=has_bf16(f"{properties.major}.{properties.minor}"),
    )


def cpu_facts() -> DeviceFacts:
    return DeviceFacts(CPU, "CPU", memory_gb=None, capability=None, shared_memory_kb=None, bf16=True)


def has_bf16(capability: str) -> bool:
    return float(capability) >= BF16_SINCE


def take_device(index: int) -> None:
    """Makes this GPU the current one: what a process probes, measures and limits before training begins is then its own
    card."""
    import torch

    if (
        torch.cuda.current_device() != index < torch.cuda.device_count()
    ):  # where a launcher shows each process one card, that is number 0
        torch.cuda.set_device(index)


def limit_memory(memory_gb: float | None) -> None:
    """Holds the run to the profile's memory (GiB), so that what fits here also fits the card it was planned for."""
    import torch

    if memory_gb is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 2**30 / total))


def inference_device() -> torch.device:
    """Where a trained model is loaded to generate: the GPU if there is one."""
    import torch

    return torch.device(CUDA if torch.cuda.is_available() else CPU)


def peak_memory_gb(device: torch.device) -> float | None:
    """The most memory this process has held so far, GiB: torch's on a GPU, else all of it; None where the system does
    not say."""
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
    """What CUDA_VISIBLE_DEVICES may name for one process: its own entries where it is set, else the numbers of all
    GPUs."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named is not None else [str(i) for i in range(count)]

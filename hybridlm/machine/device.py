"""This machine's device: what it is, its memory, and the names of devices."""

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
    """A device: this machine's, or the one that a profile describes. None: unknown, or not a property of a CPU."""

    kind: str  # cpu or cuda
    name: str  # as the driver calls it
    memory_gb: float | None  # GiB
    capability: str | None  # "8.6"
    shared_memory_kb: int | None  # that a block of a kernel can use
    bf16: bool  # in hardware


def device_facts() -> DeviceFacts:
    """The current CUDA device or, without one, the CPU."""
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
    """Makes this GPU the current one, so that a process probes, measures and limits its own card before training."""
    import torch

    # A launcher may show each process a single card, number 0.
    if torch.cuda.current_device() != index < torch.cuda.device_count():
        torch.cuda.set_device(index)


def limit_memory(memory_gb: float | None) -> None:
    """Limits the run to the profile's memory (GiB), so that what fits here also fits the card it was planned for."""
    import torch

    if memory_gb is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 2**30 / total))


def inference_device() -> torch.device:
    """The device for generating text: the GPU if there is one."""
    import torch

    return torch.device(CUDA if torch.cuda.is_available() else CPU)


def peak_memory_gb(device: torch.device) -> float | None:
    """The peak memory of this process so far, GiB: torch's on a GPU, else all of it; None: the system does not tell."""
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
    """GPUs to choose from for a child's CUDA_VISIBLE_DEVICES: this process's entries if it is set, else all numbers."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named is not None else [str(i) for i in range(count)]

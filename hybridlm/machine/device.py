"""This machine's device: what it is, its memory, and the names of devices."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

CPU, CUDA = "cpu", "cuda"
BF16_SINCE = 8.0  # compute capability; older cards do it in software
# The CUDA context, the driver and the kernels' code are outside torch's allocator, and the card may drive a display. An
# estimate: contexts of current torch builds take 0.3 to 0.6 GiB, and the card reserves some of its nominal memory.
CUDA_OUTSIDE = 0.75 * 2**30
# On a CPU: the interpreter with torch and Lightning (0.5 GiB resident when a default run starts), and the system.
CPU_OUTSIDE = 1.0 * 2**30
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


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
        bf16=float(f"{properties.major}.{properties.minor}") >= BF16_SINCE,
    )


def cpu_facts() -> DeviceFacts:
    return DeviceFacts(CPU, "CPU", memory_gb=None, capability=None, shared_memory_kb=None, bf16=True)


def take_device(index: int) -> None:
    """Makes this GPU the current one, so that a process probes, measures and limits its own card before training."""
    # A launcher may show each process a single card, number 0.
    if torch.cuda.current_device() != index < torch.cuda.device_count():
        torch.cuda.set_device(index)


def limit_memory(memory_gb: float | None) -> None:
    """Limits the run to the profile's memory (GiB), so that what fits here also fits the card it was planned for."""
    if memory_gb is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 2**30 / total))


def inference_device() -> torch.device:
    """The device for generating text: the GPU if there is one."""
    return torch.device(CUDA if torch.cuda.is_available() else CPU)


def peak_memory_gb(device: torch.device) -> float | None:
    """The peak memory of this process so far, GiB: torch's on a GPU, else all of it; None: the system does not tell."""
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
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named is not None else [str(i) for i in range(count)]


def usable_bytes(facts: DeviceFacts, memory_gb: float | None) -> int | None:
    """Bytes that one process may use for weights, activations and everything else; None: unknown. memory_gb: the
    profile's limit, GiB."""
    if facts.kind == CUDA:
        return None if facts.memory_gb is None else int(facts.memory_gb * 2**30 - CUDA_OUTSIDE)
    limits = [
        limit for limit in (system_bytes(), None if memory_gb is None else int(memory_gb * 2**30)) if limit is not None
    ]
    return int(min(limits) - CPU_OUTSIDE) if limits else None


def system_bytes() -> int | None:
    """Physical memory, or the control group's limit if that is less; None: the system does not tell."""
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    for name in _CGROUPS:
        try:
            limits.append(int(Path(name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)

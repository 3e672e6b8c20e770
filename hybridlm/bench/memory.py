"""Memory during a measurement: what is free before it, and the peak."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from hybridlm.machine.device import CUDA

_SELF, _SYSTEM = Path("/proc/self"), Path("/proc/meminfo")  # on Linux


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None if unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == CUDA else _kib(_SYSTEM, "MemAvailable")


def reset_peak(device: torch.device) -> None:
    """Starts ``peak_bytes`` again, where the system allows it."""
    if device.type == CUDA:
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or not permitted
        (_SELF / "clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int | None:
    """The peak since ``reset_peak``: allocated by torch on a GPU, resident in the whole process on a CPU; None if
    unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == CUDA else _kib(_SELF / "status", "VmHWM")


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished, so that the time can be read."""
    if device.type == CUDA:
        torch.cuda.synchronize(device)


def _kib(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])

"""Memory of one turn of a benchmark: what is free before it, and the most that was held during it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from hybridlm.machine.device import CUDA

_SELF, _SYSTEM = Path("/proc/self"), Path("/proc/meminfo")  # of Linux


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not say."""
    if device.type == CUDA:
        return torch.cuda.mem_get_info(device)[0]
    return _kib(_SYSTEM, "MemAvailable")


def forget_peak(device: torch.device) -> None:
    """From here on ``peak_bytes`` is anew, as far as the system allows it."""
    if device.type == CUDA:
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (_SELF / "clear_refs").write_text("5", encoding="ascii")
    except OSError:  # no Linux, or not allowed
        return


def peak_bytes(device: torch.device) -> int | None:
    """The most held since ``forget_peak``: allocated by torch on a GPU, resident of the whole process on a CPU; None
    where the system does not say."""
    if device.type == CUDA:
        return torch.cuda.max_memory_allocated(device)
    return _kib(_SELF / "status", "VmHWM")


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given, so that a clock may be read."""
    if device.type == CUDA:
        torch.cuda.synchronize(device)


def _kib(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])

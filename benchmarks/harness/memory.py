"""Memory of a computation: bytes from torch's allocator, counted event by event, and the process's resident size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from harness.turns import LeftOut
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that torch held on the CPU during ``function()`` above what it held before.

    Summed over the allocator's own events as torch's profiler records them: exact, whatever else the machine does. What
    libraries allocate past torch (oneDNN's scratch space) is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("torch's profiler recorded no allocation")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident_bytes() -> int:
    """Bytes of this process that are in memory now. Raises LeftOut where the system does not say (it has no /proc)."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that ``resident_bytes`` has ever been."""
    return _status("VmHWM")


def _status(field: str) -> int:
    path = Path("/proc/self/status")
    if not path.exists():
        raise LeftOut(f"{sys.platform} has no {path}")
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(field + ":"))

"""How much memory a run may use: the card's, or what the system allows this process."""

from __future__ import annotations

import os
from pathlib import Path

from hybridlm.machine.device import CUDA, DeviceFacts

# The CUDA context, the driver and the kernels' code are outside torch's allocator, and the card may drive a display. An
# estimate: contexts of current torch builds take 0.3 to 0.6 GiB, and the card reserves some of its nominal memory.
CUDA_OUTSIDE = 0.75 * 2**30
# On a CPU: the interpreter with torch and Lightning (0.5 GiB resident when a default run starts), and the system.
CPU_OUTSIDE = 1.0 * 2**30
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


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

"""Kernel packages for the tests: which folder the imports find them in, and a clean memory of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridlm.ops.kernels.probe import package_version, probe

_FAKES = Path(__file__).parent / "ops/kernels/fakes"
WORKING = (_FAKES / "conv", _FAKES / "scans")
NAMES = ("causal_conv1d", "mamba_ssm", "liger_kernel")


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
        del sys.modules[name]
    probe.cache_clear()
    package_version.cache_clear()


@contextmanager
def packages(*folders: Path) -> Iterator[None]:
    """Within it the kernel packages are those of ``folders``, the first one first."""
    path = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    _forget()
    try:
        yield
    finally:
        sys.path[:] = path
        _forget()


def calls() -> list[str]:
    """What has been called of the working packages, and forgets it."""
    found = [call for name in NAMES if name in sys.modules for call in getattr(sys.modules[name], "calls", [])]
    for name in NAMES:
        if name in sys.modules:
            getattr(sys.modules[name], "calls", []).clear()
    return found

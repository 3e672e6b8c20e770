"""Whether a kernel works on this machine. Only a run tells: packages import without their device code, or with that of
another card."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch

from hybridlm.ops.kernels import trials
from hybridlm.ops.kernels.rules import Sizes


class Mismatch(Exception):
    """A kernel ran, and its results differ from torch's."""


@dataclass(frozen=True)
class Probe:
    """The result of running a kernel on small tensors. seconds: including compilation; version: of the package."""

    name: str
    ok: bool
    reason: str | None  # why not
    seconds: float
    version: str | None


@dataclass(frozen=True)
class Kernel:
    """package: its name for pip, None: torch itself; module: its name in Python. run(device, dtype of activations),
    for layers also sizes, returns the largest relative difference from torch, at most ``tolerance``."""

    name: str
    package: str | None
    module: str
    tolerance: float
    run: Callable[..., float]


BF16 = 4e-2  # of the largest number: sums of bfloat16 numbers in another order differ by more than its 8 bits
MAMBA3 = 2 * BF16  # it also rounds what it rotates and scales to bfloat16
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("causal-conv1d", "causal-conv1d", "causal_conv1d", BF16, trials.conv),
        Kernel("selective scan", "mamba-ssm", "mamba_ssm", BF16, trials.mamba1),
        Kernel("SSD scan", "mamba-ssm", "mamba_ssm", BF16, trials.mamba2),
        Kernel("Mamba-2 layer", "mamba-ssm", "mamba_ssm", BF16, trials.mamba2_layer),
        Kernel("Mamba-3 SISO", "mamba-ssm", "mamba_ssm", MAMBA3, trials.siso),
        Kernel("Mamba-3 MIMO", "mamba-ssm", "mamba_ssm", MAMBA3, trials.mimo),
        Kernel("linear cross-entropy", "liger-kernel", "liger_kernel", BF16, trials.loss),
        Kernel("flash attention", None, "torch", BF16, trials.flash_attention),
        Kernel("efficient attention", None, "torch", BF16, trials.efficient_attention),
        Kernel("8-bit AdamW (bitsandbytes)", "bitsandbytes", "bitsandbytes", 1.0, trials.bitsandbytes_adamw),
    )
}


@cache
def probe(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> Probe:
    """Runs the kernel ``name`` of ``KERNELS`` forward and backward on ``device``, once per process, dtype and sizes.
    Does not raise.

    sizes: a layer's, for a kernel that is compiled for its widths and may need more than the card has; None: small.
    """
    kernel = KERNELS[name]
    version = package_version(kernel.package or "torch")
    if kernel.package is not None and not _found(kernel.module):
        return Probe(name, False, f"{kernel.package} is not installed", 0.0, version)
    began = time.perf_counter()
    try:
        difference = kernel.run(device, dtype) if sizes is None else kernel.run(device, dtype, sizes)
        if not difference <= kernel.tolerance:  # nor where it is not a number
            raise Mismatch(
                f"its results differ from torch's by {difference:.2g} of the largest number; rounding explains at most"
                f" {kernel.tolerance:g}"
            )
        reason = None
    except Exception as error:  # a broken package raises anything: ImportError, OSError, a compiler's own
        reason = _reason(kernel, error)
    return Probe(name, reason is None, reason, time.perf_counter() - began, version)


def _reason(kernel: Kernel, error: Exception) -> str:
    if isinstance(error, Mismatch):
        return str(error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    where = "cannot be imported" if isinstance(error, (ImportError, OSError)) else "fails when it runs"
    return f"{kernel.package or 'torch'} {where} ({type(error).__name__}{': ' if text else ''}{text[:160]})"


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@cache
def package_version(package: str) -> str | None:
    """The version of an installed distribution; None: not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""Does a kernel work here? The only answer that counts is a run: packages import without their device code, or for
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
    """A kernel ran and gave other numbers than torch."""


@dataclass(frozen=True)
class Probe:
    """What a run of a kernel on a tiny tensor came to. seconds: of the run, its compilation included; version: of the
    package."""

    name: str
    ok: bool
    reason: str | None  # why not
    seconds: float
    version: str | None


@dataclass(frozen=True)
class Kernel:
    """package: as pip names it, None: torch itself; module: as Python does. run(device, dtype of activations), those of
    layers also with sizes, gives the largest relative difference from torch, which must not exceed ``tolerance``."""

    name: str
    package: str | None
    module: str
    tolerance: float
    run: Callable[..., float]


BF16, FP32 = (
    4e-2,
    1e-4,
)  # of the largest number; sums of bfloat16 numbers taken in another order differ by more than its 8 bits
MAMBA3 = 2 * BF16  # the limit of its parity tests: also what it turns and scales inside is rounded to bfloat16
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
        Kernel("Triton", "triton", "triton", FP32, trials.triton),
        Kernel("flash attention", None, "torch", BF16, trials.flash_attention),
        Kernel("efficient attention", None, "torch", BF16, trials.efficient_attention),
        Kernel("8-bit AdamW (bitsandbytes)", "bitsandbytes", "bitsandbytes", 1.0, trials.bitsandbytes_adamw),
        Kernel("8-bit AdamW (torchao)", "torchao", "torchao", 1.0, trials.torchao_adamw),
    )
}


@cache
def probe(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> Probe:
    """Runs the kernel ``name`` of ``KERNELS`` forward and backward on ``device``, once per process, dtype and sizes.
    Raises nothing.

    sizes: a layer's, for a kernel that is compiled for its widths and may need more of the card than it has; None:
    small ones.
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
                f"its numbers differ from torch's by {difference:.2g} of the largest, at most {kernel.tolerance:g} is"
                " rounding"
            )
        reason = None
    except (
        Exception
    ) as error:  # what is broken raises all kinds: ImportError, OSError of a library, AttributeError, a compiler's own
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
    """Of an installed distribution; None: not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

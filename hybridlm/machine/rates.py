"""How fast a device multiplies matrices: the peak that a precision is compared with, and a measurement for cards
without a profile."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Literal

from hybridlm.machine.device import CPU, CUDA

if TYPE_CHECKING:
    import torch

    from hybridlm.config.hardware import Peaks

PeakName = Literal["fp32", "tf32", "fp16", "bf16"]
SECONDS = 0.5  # of the measurement
_SIDES = {True: 4096, False: 1024}  # of the square matrices, on CUDA and on a CPU: large enough for their full rate


def peak_name(precision: str, tf32: bool) -> PeakName | None:
    """The peak to compare training in ``precision`` with; None: profiles have none (float64). tf32: fp32 products may
    use it."""
    match precision:
        case "bf16-mixed" | "bf16-true":
            return "bf16"
        case "16-mixed":
            return "fp16"
        case "32-true":
            return "tf32" if tf32 else "fp32"
    return None


def tf32_allowed() -> bool:
    """Whether torch may compute fp32 products in TF32, which is off by default."""
    import torch

    return torch.get_float32_matmul_precision() != "highest"


def peak_of(peaks: Peaks, name: PeakName) -> float | None:
    """TFLOP/s of one device. A card without TF32 computes such products in fp32."""
    return {"fp32": peaks.fp32, "tf32": peaks.tf32 or peaks.fp32, "fp16": peaks.fp16, "bf16": peaks.bf16}[name]


def matrix_tflops(device: torch.device, name: PeakName, seconds: float = SECONDS) -> float:
    """TFLOP/s of the best of a series of square products within ``seconds``, after a warm-up, with torch's TF32
    setting."""
    import torch

    dtype = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    side = _SIDES[device.type == CUDA]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> float:
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == CUDA:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    product()
    best, until = product(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, product())
    return 2 * side**3 / best / 1e12


@cache
def cpu_tflops() -> float:
    """TFLOP/s of this machine's CPU in fp32 products, measured once: good enough for an estimate."""
    import torch

    return matrix_tflops(torch.device(CPU), "fp32", seconds=0.1)

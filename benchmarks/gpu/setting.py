"""Where a part of gpu_check.py runs: the card with its full shapes, or a CPU with tiny ones, which only shows that the code runs."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from harness.memory import peak_bytes

from hybridlm.hardware.device import device_facts, inference_device
from hybridlm.hardware.profiles import profile_of
from hybridlm.hardware.rates import matrix_tflops


@dataclass(frozen=True)
class Setting:
    """dry: tiny shapes on the CPU, one round. quick: a third of the rounds."""

    dry: bool
    quick: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else inference_device()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        return 1 if self.dry else 5 if self.quick else 15

    @property
    def memory_gb(self) -> float:
        """GiB of the card; a CPU pretends to have one of 24."""
        memory = device_facts().memory_gb
        return 24.0 if self.dry or memory is None else memory

    @property
    def dtype(self) -> torch.dtype:
        """What training computes in under autocast."""
        return torch.bfloat16 if self.dry or device_facts().bf16 else torch.float16

    @property
    def vocab(self) -> int:
        return 64 if self.dry else 32768

    def contexts(self, *wanted: int) -> list[int]:
        """Those that this card has memory for, at one sequence of a 12-layer model; in a dry run a tiny one for each."""
        most = 16384 if self.memory_gb >= 22 else 8192 if self.memory_gb >= 14 else 4096
        return [context for context in wanted if context <= most]

    def length(self, context: int) -> int:
        """Tokens of a sequence that stands for ``context``."""
        return max(8, context // 512) if self.dry else context

    def peak_tflops(self) -> tuple[float, str]:
        """(TFLOP/s of the card in ``dtype``, where that is from)."""
        name = "bf16" if self.dtype == torch.bfloat16 else "fp16"
        profile = None if self.dry else profile_of(device_facts().name)
        peak = None if profile is None else getattr(profile.peak_tflops, name)
        if peak is not None:
            return peak, f"{name}, {profile.source}"
        return matrix_tflops(self.device, name, seconds=0.05 if self.dry else 0.5), f"{name}, measured: the card is in no profile"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Gives back what the case before this one held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def peak_of_call(setting: Setting, function) -> tuple[int, int]:  # noqa: ANN001
    """(bytes allocated at most, bytes reserved at most) in ``function()``, all that was held before included on a GPU. A CPU reserves
    nothing: there both are what the call alone allocates."""
    if not setting.on_gpu:
        peak = peak_bytes(function)
        return peak, peak
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

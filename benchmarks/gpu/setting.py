"""Where a part of gpu_check.py runs: the card with its full shapes, or a CPU with tiny ones, which only shows that the
code runs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from harness.memory import peak_bytes

from hybridlm.machine.device import device_facts, inference_device
from hybridlm.machine.profiles import PeakName, matrix_tflops, peak_of, profile_of


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
        """Those that this card has memory for, at one sequence of a 12-layer model; in a dry run the first and the
        last."""
        if self.dry:
            return [wanted[0], wanted[-1]]
        most = 16384 if self.memory_gb >= 22 else 8192 if self.memory_gb >= 14 else 4096
        return [context for context in wanted if context <= most]

    def length(self, context: int) -> int:
        """Tokens of a sequence that stands for ``context``."""
        return max(8, context // 512) if self.dry else context

    @property
    def peak_tflops(self) -> float:
        """TFLOP/s of the card in ``dtype``: its profile's, else measured once."""
        return _peak_tflops(self)

    def affordable(self, contenders: Mapping[str, Callable[[], object]], seconds: float, calls: int = 1) -> int:
        """Rounds of ``calls`` calls of each that fit into so many seconds, which calling each once shows; three at
        least."""
        began = time.perf_counter()
        for contender in contenders.values():
            contender()
        return max(min(self.rounds, 3), min(self.rounds, int(seconds / calls / (time.perf_counter() - began)) - 1))

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Gives back what the case before this one held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


@cache
def _peak_tflops(setting: Setting) -> float:
    name: PeakName = "bf16" if setting.dtype == torch.bfloat16 else "fp16"
    profile = None if setting.dry else profile_of(device_facts().name)
    peak = None if profile is None else peak_of(profile.peak_tflops, name)
    return matrix_tflops(setting.device, name, seconds=0.05 if setting.dry else 0.5) if peak is None else peak


def peak_of_call(setting: Setting, function: Callable[[], object]) -> tuple[int, int]:
    """(bytes allocated at most, bytes reserved at most) in ``function()``, all that was held before included on a GPU.
    A CPU reserves nothing: there both are what the call alone allocates."""
    if not setting.on_gpu:
        peak = peak_bytes(function)
        return peak, peak
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

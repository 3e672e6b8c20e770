"""The profiles of conf/hardware: for this machine's card, and for the one that a run is planned for."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import yaml
from torch.utils.benchmark import Timer

from hybridlm.config.groups import root
from hybridlm.config.hardware import HardwareConfig, Peaks
from hybridlm.machine.device import CPU, CUDA, DeviceFacts, cpu_facts, device_facts

PeakName = Literal["fp32", "tf32", "fp16", "bf16"]
SECONDS = 0.5  # of the measurement
_SIDES = {True: 4096, False: 1024}  # of the square matrices, on CUDA and on a CPU: large enough for their full rate


def peak_name(precision: str, tf32: bool) -> PeakName | None:
    """The peak to compare training in ``precision`` with; None: profiles have none (float64). tf32: fp32 products may
    use it."""
    fp32: PeakName = "tf32" if tf32 else "fp32"
    names: dict[str, PeakName] = {"bf16-mixed": "bf16", "bf16-true": "bf16", "16-mixed": "fp16", "32-true": fp32}
    return names.get(precision)


def tf32_allowed() -> bool:
    """Whether torch may compute fp32 products in TF32, which is off by default."""
    return torch.get_float32_matmul_precision() != "highest"


def peak_of(peaks: Peaks, name: PeakName) -> float | None:
    """TFLOP/s of one device. A card without TF32 computes such products in fp32."""
    return {"fp32": peaks.fp32, "tf32": peaks.tf32 or peaks.fp32, "fp16": peaks.fp16, "bf16": peaks.bf16}[name]


def matrix_tflops(device: torch.device, name: PeakName, seconds: float = SECONDS) -> float:
    """TFLOP/s of the best of a series of square products within ``seconds``, after a warm-up, with torch's TF32
    setting."""
    dtype = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    side = _SIDES[device.type == CUDA]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    names = {"mm": torch.mm, "a": a, "b": b, "out": torch.empty_like(a)}
    product = Timer("mm(a, b, out=out)", globals=names, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(product.blocked_autorange(min_run_time=seconds).times) / 1e12


@cache
def cpu_tflops() -> float:
    """TFLOP/s of this machine's CPU in fp32 products, measured once: good enough for an estimate."""
    return matrix_tflops(torch.device(CPU), "fp32", seconds=0.1)


@cache
def known_profiles() -> tuple[HardwareConfig, ...]:
    """The profiles that name cards, in the order of their files."""
    found = []
    for path in sorted((root() / "conf/hardware").glob("*.yaml")):
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        fields.pop("defaults", None)  # they set budgets, which are not facts about a card
        profile = HardwareConfig.model_validate(fields)
        if profile.cards:
            found.append(profile)
    return tuple(found)


def names_card(profile: HardwareConfig, card: str) -> bool:
    """Whether the driver's name ``card`` is one of the profile's. Drivers before 2022 omit "NVIDIA "."""
    return card.removeprefix("NVIDIA ") in {name.removeprefix("NVIDIA ") for name in profile.cards}


def profile_of(card: str) -> HardwareConfig | None:
    """The profile that names this card, or None."""
    return next((profile for profile in known_profiles() if names_card(profile, card)), None)


def planned_device(hardware: HardwareConfig) -> DeviceFacts:
    """The device a run is planned for: the profile's if it names cards, else this machine's within its limits."""
    if hardware.accelerator == CPU:
        return cpu_facts()
    if hardware.cards:
        return DeviceFacts(
            kind=CUDA,
            name=hardware.cards[0],
            memory_gb=hardware.memory_gb,
            capability=hardware.compute_capability,
            shared_memory_kb=hardware.shared_memory_kb,
            bf16=hardware.bf16,
        )
    here = device_facts()
    if here.kind == CPU:
        return here
    memory = (
        here.memory_gb
        if hardware.memory_gb is None or here.memory_gb is None
        else min(here.memory_gb, hardware.memory_gb)
    )
    return DeviceFacts(
        kind=CUDA,
        name=here.name,
        memory_gb=memory,
        capability=hardware.compute_capability or here.capability,
        shared_memory_kb=hardware.shared_memory_kb or here.shared_memory_kb,
        bf16=here.bf16 and hardware.bf16,
    )


def planned_rates(hardware: HardwareConfig) -> tuple[Peaks, float | None]:
    """(peaks, GB/s) of ``planned_device``: the profile's, else those of the one that names this card, else empty."""
    if hardware.cards or hardware.peak_tflops != Peaks() or hardware.accelerator == CPU:
        return hardware.peak_tflops, hardware.bandwidth_gb_s
    known = profile_of(device_facts().name)
    return (
        (Peaks(), hardware.bandwidth_gb_s)
        if known is None
        else (known.peak_tflops, hardware.bandwidth_gb_s or known.bandwidth_gb_s)
    )

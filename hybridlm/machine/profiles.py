"""The profiles of conf/hardware: for this machine's card, and for the one that a run is planned for."""

from __future__ import annotations

from functools import cache

import yaml

from hybridlm.config.groups import root
from hybridlm.config.hardware import HardwareConfig, Peaks
from hybridlm.machine.device import CPU, CUDA, DeviceFacts, cpu_facts, device_facts


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

"""Profiles against the arithmetic of their cards, and what is known of a card by its name."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from hybridlm.cli.compose import compose_config
from hybridlm.config.groups import root
from hybridlm.config.hardware import HardwareConfig, Peaks
from hybridlm.errors import UserError
from hybridlm.machine import profiles
from hybridlm.machine.device import device_facts
from hybridlm.machine.profiles import known_profiles, planned_device, planned_rates, profile_of

# FLOPs per clock of one SM, from the white papers: fp32 cores x 2, then tensor cores with fp32 sums in TF32 and in 16
# bits. GeForce cards have half the 16-bit rate that they have with fp16 sums. None: the SM has no such unit.
TURING, GA100, GEFORCE, HOPPER = (128, None, 1024), (128, 1024, 2048), (256, 256, 512), (256, 2048, 4096)
# profile: (SMs, MHz with tensor cores, MHz without, the rates of an SM)
CARDS = {
    "rtx3060": (28, 1777, 1777, GEFORCE),
    "rtx3060_laptop": (30, 1703, 1703, GEFORCE),
    "rtx3070": (46, 1725, 1725, GEFORCE),
    "rtx4060": (24, 2460, 2460, GEFORCE),
    "rtx4070": (46, 2475, 2475, GEFORCE),
    "rtx4080": (76, 2505, 2505, GEFORCE),
    "rtx4090": (128, 2520, 2520, GEFORCE),
    "rtx5090": (170, 2407, 2407, GEFORCE),
    "t4": (40, 1590, 1590, TURING),
    "a100": (108, 1410, 1410, GA100),
    "h100": (132, 1830, 1980, HOPPER),
    "h200": (132, 1830, 1980, HOPPER),
}
# Memory buses: pins and Gbit/s of each; a bus moves pins x rate / 8 bytes. Of the H200 the data sheet gives the product
# alone.
BUSES = {
    "rtx3060": (192, 15.0),
    "rtx3060_laptop": (192, 14.0),
    "rtx3070": (256, 14.0),
    "rtx4060": (128, 17.0),
    "rtx4070": (192, 21.0),
    "rtx4080": (256, 22.4),
    "rtx4090": (384, 21.0),
    "rtx5090": (512, 28.0),
    "t4": (256, 10.0),
    "a100": (5120, 3.186),
    "h100": (5120, 5.2375),
}
# KiB of shared memory that one block may have, by compute capability: CUDA programming guide, technical specifications.
SHARED = {"7.5": 64, "8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "12.0": 99}


def named(name: str) -> HardwareConfig:
    return next(profile for profile in known_profiles() if profile.name == name)


def test_every_profile_of_a_card_is_checked_here():
    assert {profile.name for profile in known_profiles()} == CARDS.keys() == BUSES.keys() | {"h200"}


@pytest.mark.parametrize("name", CARDS)
def test_peaks_are_sms_times_clock_times_the_rate_of_an_sm(name):
    sms, tensor_mhz, mhz, (fp32, tf32, half) = CARDS[name]
    profile = named(name)
    assert profile.peak_tflops.fp32 == pytest.approx(sms * mhz * fp32 / 1e6, rel=0.02)
    assert profile.peak_tflops.fp16 == pytest.approx(sms * tensor_mhz * half / 1e6, rel=0.02)
    assert profile.peak_tflops.bf16 == (profile.peak_tflops.fp16 if profile.bf16 else None)
    assert profile.peak_tflops.tf32 == (
        None if tf32 is None else pytest.approx(sms * tensor_mhz * tf32 / 1e6, rel=0.02)
    )
    assert f"{sms} SMs" in profile.source
    assert str(tensor_mhz) in profile.source


@pytest.mark.parametrize("name", CARDS)
def test_bandwidth_shared_memory_and_capability(name):
    profile = named(name)
    if name in BUSES:
        pins, rate = BUSES[name]
        assert profile.bandwidth_gb_s == pytest.approx(pins * rate / 8, rel=0.02)
    assert profile.shared_memory_kb == SHARED[profile.compute_capability]
    assert profile.bf16 == (float(profile.compute_capability) >= 8)


def test_composed_by_hydra_a_profile_is_the_same_with_the_budgets_of_auto():
    auto = compose_config(["hardware=auto"]).hardware
    for profile in known_profiles():
        composed = compose_config([f"hardware={profile.name}"]).hardware
        assert composed == profile.model_copy(update={"cpu": auto.cpu, "cuda": auto.cuda})


def test_no_card_is_in_two_profiles():
    cards = [card for profile in known_profiles() for card in profile.cards]
    assert len(cards) == len(set(cards))


@pytest.mark.parametrize(
    ("card", "profile"),
    [
        ("NVIDIA GeForce RTX 3070", "rtx3070"),
        ("GeForce RTX 3070", "rtx3070"),
        ("NVIDIA GeForce RTX 3070 Ti", None),
        ("NVIDIA GeForce RTX 3060", "rtx3060"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "rtx3060_laptop"),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("Tesla T4", "t4"),
        ("A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", None),
        ("", None),
    ],
)
def test_a_card_is_known_by_its_whole_name(card, profile):
    found = profile_of(card)
    assert (None if found is None else found.name) == profile


def test_a_variant_by_override():
    assert compose_config(["hardware=rtx3070"]).hardware.memory_gb == 8
    assert compose_config(["hardware=rtx3070", "hardware.memory_gb=12"]).hardware.memory_gb == 12
    assert compose_config(["hardware=rtx3060_laptop"]).hardware.memory_gb == 6


def test_a_capability_may_be_typed_as_a_number():
    assert compose_config(["hardware.compute_capability=8.6"]).hardware.compute_capability == "8.6"
    assert compose_config(["hardware.compute_capability=12.0"]).hardware.compute_capability == "12.0"
    assert compose_config(["hardware.compute_capability=9"]).hardware.compute_capability == "9.0"


@pytest.mark.parametrize(
    "setting",
    [
        "hardware.compute_capability=sm_86",
        "hardware.compute_capability=true",
        "hardware.peak_tflops=40",
        "hardware.peak_tflops.bf16=0",
        "hardware.peak_tflops.int8=100",
        "hardware.shared_memory_kb=99.5",
        "hardware.bandwidth_gb_s=-1",
        "hardware.memory_gb=0",
        "hardware=rtx9999",
    ],
)
def test_a_wrong_value_is_named(setting):
    with pytest.raises(UserError) as error:
        compose_config([setting])
    assert all(
        "\n" not in problem and setting.split("=")[0].rpartition(".")[2] in problem for problem in error.value.problems
    )


def test_a_wrong_capability_gets_an_example():
    with pytest.raises(
        UserError, match=r"compute_capability = 'sm_86': expected NVIDIA's number with one decimal, such as 8\.6"
    ):
        compose_config(["hardware.compute_capability=sm_86"])


def test_a_broken_profile_is_no_silent_one(tmp_path, monkeypatch):
    (tmp_path / "conf/hardware").mkdir(parents=True)
    (tmp_path / "conf/hardware/x.yaml").write_text("name: x\ncards: [X]\nvram: 8\n")
    monkeypatch.setattr(profiles, "root", lambda: tmp_path)
    known_profiles.cache_clear()
    try:
        with pytest.raises(ValidationError, match="vram"):
            known_profiles()
    finally:
        known_profiles.cache_clear()


# ---- the device that is planned for


def test_a_plan_for_a_card_does_not_look_at_this_machine(monkeypatch):
    def refuse(*arguments: object) -> object:
        raise AssertionError("torch.cuda was asked")

    for name in ("is_available", "current_device", "get_device_properties", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    config = compose_config(["hardware=rtx4060"]).hardware
    planned = planned_device(config)
    assert (planned.kind, planned.memory_gb, planned.capability, planned.shared_memory_kb, planned.bf16) == (
        "cuda",
        8,
        "8.9",
        99,
        True,
    )
    peaks, bandwidth = planned_rates(config)
    assert (peaks.bf16, bandwidth) == (30.2, 272)
    assert planned_device(compose_config(["hardware=cpu"]).hardware).kind == "cpu"


def test_without_a_card_auto_plans_for_the_cpu_and_knows_no_rate(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = compose_config(["hardware=auto"]).hardware
    assert planned_device(config) == device_facts()
    assert planned_device(config).kind == "cpu"
    assert planned_rates(config) == (Peaks(), None)
    assert planned_rates(compose_config(["hardware.peak_tflops.fp32=0.5"]).hardware)[0].fp32 == 0.5


def test_the_yaml_files_name_every_fact():
    for path in (root() / "conf/hardware").glob("*.yaml"):
        fields = yaml.safe_load(path.read_text())
        if fields.get("cards"):
            assert HardwareConfig.model_fields.keys() - {"cpu", "cuda"} <= fields.keys(), path.name


def test_the_page_has_the_profiles_of_today():
    script = runpy.run_path(str(Path(__file__).parents[2] / "docs/hardware.py"))
    text = script["PAGE"].read_text(encoding="utf-8")
    assert script["page"](text) == text, "run: python docs/hardware.py"
    assert len(script["table"]().splitlines()) == 2 + len(CARDS)

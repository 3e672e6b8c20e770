"""What a run takes from the machine: precision, memory limit, and the peak that perf/mfu is a share of. The cards are
pretended."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.config.hardware import Peaks
from hybridlm.errors import UserError
from hybridlm.machine import description
from hybridlm.machine.description import Machine, resolve_machine
from hybridlm.machine.device import device_facts
from hybridlm.machine.profiles import matrix_tflops, peak_name, peak_of, planned_device, planned_rates

MEASURED = 3.25


@dataclass
class Asked:
    """What was asked of a pretended card."""

    fractions: list[float] = field(default_factory=list)
    rates: list[str] = field(default_factory=list)
    devices: list[int] = field(default_factory=lambda: [0])  # that were made the current one


def card(monkeypatch: pytest.MonkeyPatch, name: str, capability: str, memory_gb: float = 24.0, count: int = 1) -> Asked:
    asked = Asked()
    major, minor = map(int, capability.split("."))
    properties = SimpleNamespace(
        total_memory=int(memory_gb * 2**30), major=major, minor=minor, shared_memory_per_block_optin=99 * 1024
    )
    fake = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: asked.devices[-1],
        "set_device": asked.devices.append,
        "get_device_name": lambda: name,
        "get_device_properties": lambda index: properties,
        "set_per_process_memory_fraction": asked.fractions.append,
    }
    for attribute, function in fake.items():
        monkeypatch.setattr(torch.cuda, attribute, function)

    def measured(device: torch.device, peak: str) -> float:
        asked.rates.append(peak)
        return MEASURED

    monkeypatch.setattr(description, "matrix_tflops", measured)
    return asked


def resolved(*overrides: str) -> Machine:
    return resolve_machine(compose_config(["trainer.devices=1", *overrides]))


def test_auto_takes_the_peak_of_the_profile_that_names_the_card(monkeypatch):
    asked = card(monkeypatch, "NVIDIA GeForce RTX 4090", "8.9")
    found = resolved()
    assert (found.precision, found.peak_flops) == ("bf16-mixed", 165.2e12)
    (note,) = found.notes
    assert note.startswith("peak 165.2 TFLOP/s in bf16 (NVIDIA Ada white paper")
    assert (asked.fractions, asked.rates) == ([], []), "no memory limit, nothing measured"


@pytest.mark.parametrize(
    ("precision", "peak"),
    [("bf16-mixed", 165.2), ("bf16-true", 165.2), ("16-mixed", 165.2), ("32-true", 82.6), ("64-true", None)],
)
def test_the_peak_is_that_of_the_precision(monkeypatch, precision, peak):
    asked = card(monkeypatch, "NVIDIA GeForce RTX 4090", "8.9")
    found = resolved(f"trainer.precision={precision}")
    assert found.peak_flops == (None if peak is None else peak * 1e12)
    assert asked.rates == []


def test_products_of_fp32_that_may_round_to_tf32_have_its_peak(monkeypatch):
    card(monkeypatch, "NVIDIA H100 80GB HBM3", "9.0", 79)
    assert resolved("trainer.precision=32-true").peak_flops == pytest.approx(66.9e12)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert resolved("trainer.precision=32-true").peak_flops == pytest.approx(494.7e12)
    finally:
        torch.set_float32_matmul_precision(before)


def test_all_devices_together(monkeypatch):
    card(monkeypatch, "NVIDIA H200", "9.0", 140, count=4)
    assert resolve_machine(compose_config(["data.global_batch=64"])).peak_flops == 4 * 989.4e12


@pytest.mark.parametrize(("place", "count", "current"), [(0, 4, 0), (3, 4, 3), (3, 1, 0)])
def test_each_process_takes_its_own_card(monkeypatch, place, count, current):
    """Lightning does so too, but later: kernels are probed, rates measured and memory limited before."""
    monkeypatch.setattr("hybridlm.machine.description.local_rank", lambda: place)
    asked = card(monkeypatch, "NVIDIA X", "9.0", count=count)
    limits = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction: limits.append(asked.devices[-1])
    )
    resolved(f"trainer.devices={count}", "hardware.memory_gb=8")
    assert (asked.devices[-1], limits) == (current, [current])


def test_an_unknown_card_is_measured_in_the_precision_of_training(monkeypatch):
    asked = card(monkeypatch, "NVIDIA GeForce RTX 3070 Ti", "8.6", 8)
    found = resolved()
    assert (found.peak_flops, asked.rates) == (MEASURED * 1e12, ["bf16"])
    (note,) = found.notes
    assert all(part in note for part in ("bf16", "RTX 3070 Ti", "3.2 TFLOP/s", "measured"))
    resolved("trainer.precision=32-true")
    assert asked.rates == ["bf16", "fp32"]


def test_a_peak_that_the_user_gives_is_taken(monkeypatch):
    asked = card(monkeypatch, "NVIDIA GeForce RTX 3070 Ti", "8.6", 8)
    assert resolved("hardware.peak_tflops.bf16=43.5").peak_flops == 43.5e12
    assert asked.rates == []
    assert resolved("hardware.peak_tflops.fp32=21.7").peak_flops == MEASURED * 1e12, "it is not of this precision"
    card(monkeypatch, "NVIDIA GeForce RTX 4090", "8.9")
    assert resolved("hardware.peak_tflops.bf16=100").peak_flops == 100e12


def test_on_another_card_the_memory_limit_holds_and_the_peak_is_the_cards(monkeypatch):
    asked = card(monkeypatch, "NVIDIA H100 80GB HBM3", "9.0", 80)
    found = resolved("hardware=rtx4060")
    assert asked.fractions == [pytest.approx(0.1)]
    assert found.peak_flops == 989.4e12
    first, second = found.notes
    assert all(part in first for part in ("hardware=rtx4060", "NVIDIA H100 80GB HBM3", "8 GiB", "perf/mfu"))
    assert second.startswith("peak 989.4 TFLOP/s in bf16 (NVIDIA H100 white paper")


def test_on_its_own_card_a_profile_says_no_more_than_the_peak(monkeypatch):
    asked = card(monkeypatch, "NVIDIA GeForce RTX 4060", "8.9", 7.6)
    found = resolved("hardware=rtx4060")
    assert (found.peak_flops, len(found.notes), asked.fractions) == (
        30.2e12,
        1,
        [1.0],
    ), "a card shows less than its nominal memory"


def test_turing_trains_in_float16_whatever_the_profile_says(monkeypatch):
    card(monkeypatch, "Tesla T4", "7.5", 14.6)
    assert resolved("hardware=t4").precision == resolved("hardware=auto").precision == "16-mixed"
    assert resolved("hardware=t4").peak_flops == 65e12
    assert resolved("hardware=rtx4060").precision == "16-mixed", (
        "the card that is here computes, not the one that is planned for"
    )
    with pytest.raises(UserError, match="'bf16-mixed': Tesla T4 has no bfloat16"):
        resolved("trainer.precision=bf16-mixed")
    with pytest.raises(UserError, match="hardware=t4 has no bfloat16"):
        resolved("hardware=t4", "trainer.precision=bf16-true")


def test_a_card_is_planned_for_within_its_limits(monkeypatch):
    card(monkeypatch, "NVIDIA H100 80GB HBM3", "9.0", 79)
    config = compose_config(["hardware.memory_gb=12"]).hardware
    assert planned_device(config).memory_gb == 12
    assert planned_device(compose_config([]).hardware) == device_facts()
    assert planned_rates(config)[1] == 3352
    card(monkeypatch, "NVIDIA X", "10.0", 79)
    assert planned_rates(config) == (Peaks(), None)


# ---- a CPU


def test_on_a_cpu_nothing_is_measured_and_a_given_peak_is_taken():
    found = resolved("hardware=cpu")
    assert (found.peak_flops, found.notes) == (None, ())
    assert resolved("hardware=cpu", "hardware.peak_tflops.fp32=0.5").peak_flops == 0.5e12
    assert resolved("hardware=cpu", "hardware.peak_tflops.fp32=0.5", "trainer.precision=64-true").peak_flops is None


# ---- rates


@pytest.mark.parametrize(
    ("precision", "tf32", "name"),
    [
        ("32-true", False, "fp32"),
        ("32-true", True, "tf32"),
        ("16-mixed", True, "fp16"),
        ("bf16-mixed", False, "bf16"),
        ("64-true", True, None),
    ],
)
def test_peak_names(precision, tf32, name):
    assert peak_name(precision, tf32) == name


def test_a_card_without_tf32_has_the_peak_of_fp32():
    assert peak_of(Peaks(fp32=8.1), "tf32") == 8.1
    assert peak_of(Peaks(fp32=8.1), "bf16") is None


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_measured_rate_is_that_of_some_product(name):
    """At least that of a single product in Python's time, at most what no core of today does."""
    assert 1e-4 < matrix_tflops(torch.device("cpu"), name, seconds=0.05) < 1000

"""For each thing that is missing on a described stack the exact line that installs it, or why it cannot be had."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm.machine.doctor import PINS, Stack, advice

CONV = 'pip install ninja packaging setuptools wheel && pip install --no-build-isolation "causal-conv1d==1.6.2.post1"'
MAMBA = 'pip install ninja packaging setuptools wheel && pip install --no-build-isolation "mamba-ssm==2.3.2.post1"'
BUILD = "MAX_JOBS=2"
HAVE = {"triton": "3.7.1", "tensorboard": "2.20", "lm-eval": "0.4.9"}
AMPERE = Stack("Linux", "3.12.3", "2.13.0", "13.0", "580.65.06", "8.6", nvcc="13.0", packages=HAVE)


Lines = dict[str, tuple[str | None, str | None]]  # by package: the command, and a part of the note


def assert_advice(stack: Stack, expected: Lines) -> None:
    found = lines(stack)
    assert {name: command for name, (command, _) in found.items()} == {name: line[0] for name, line in expected.items()}
    for name, (_, note) in expected.items():
        assert (note is None) == (found[name][1] is None)
        assert (note or "") in (found[name][1] or ""), name


def lines(stack: Stack) -> Lines:
    return {line.package: (line.command, line.note) for line in advice(stack)}


REST = {
    "liger-kernel": ('pip install "liger-kernel==0.8.5"', None),
    "bitsandbytes": ('pip install "bitsandbytes>=0.45"', None),
}
ALL = {"causal-conv1d": (CONV, BUILD), "mamba-ssm": (MAMBA, BUILD), **REST}


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "9.0", "12.0"])
def test_a_linux_machine_with_everything_to_install(capability):
    """T4, A100, RTX 3070, RTX 4090, H100 and RTX 5090."""
    assert_advice(replace(AMPERE, capability=capability), ALL)


def test_all_is_there():
    names = ("causal-conv1d", "mamba-ssm", "liger-kernel", "bitsandbytes")
    assert advice(replace(AMPERE, packages={**HAVE, **dict.fromkeys(names, "1")})) == []


def test_the_order_is_that_of_the_work():
    assert [line.package for line in advice(replace(AMPERE, packages={}))] == [
        *("triton", "causal-conv1d", "mamba-ssm", "liger-kernel", "bitsandbytes", "tensorboard", "lm-eval")
    ]


def test_a_torch_without_cuda_comes_first():
    stack = replace(AMPERE, torch_cuda=None, capability=None)
    note = "torch 2.13.0"
    assert_advice(stack, {"torch": ('pip install --force-reinstall "torch==2.13.0"', note)})
    note = "pytorch.org/get-started/locally"
    assert_advice(replace(stack, system="Windows"), {"torch": (None, note)})


def test_a_driver_that_torch_cannot_use():
    note = "torch 2.13.0 (CUDA 13.0)"
    assert_advice(replace(AMPERE, capability=None), {"driver": (None, note)})


def test_no_card():
    stack = Stack("Linux", "3.11.7", "2.13.0", None, None, None, packages=HAVE)
    assert_advice(stack, {"kernels": (None, "NVIDIA driver")})
    assert_advice(
        replace(stack, torch_cuda="13.0"),
        {"kernels": (None, "NVIDIA driver")},
    )


def test_macos():
    stack = Stack("Darwin", "3.12.3", "2.13.0", None, None, None)
    assert_advice(
        stack,
        {
            "kernels": (None, "macOS"),
            "tensorboard": ('pip install "tensorboard>=2.16"', None),
            "lm-eval": ('pip install "lm-eval>=0.4.13"', None),
        },
    )


def test_windows():
    stack = replace(AMPERE, system="Windows", packages={"tensorboard": "2.20", "lm-eval": "0.4.9"})
    assert_advice(
        stack,
        {
            "triton": ("pip install triton-windows", None),
            "causal-conv1d": (None, "WSL2"),
            "mamba-ssm": (None, "WSL2"),
            **REST,
            "liger-kernel": ('pip install --no-deps "liger-kernel==0.8.5"', None),
        },
    )
    assert "triton" not in lines(replace(stack, packages={"triton-windows": "3.5"}))


@pytest.mark.parametrize(
    ("capability", "cuda", "note"),
    [
        ("12.0", "12.6", "CUDA 12.8 or newer; this one has 12.6"),
        ("10.3", "12.8", "CUDA 13.0 or newer; this one has 12.8"),
        ("7.0", "12.8", "7.5 or newer; this card has 7.0"),
    ],
)
def test_a_card_that_the_build_does_not_cover(capability, cuda, note):
    stack = replace(AMPERE, capability=capability, torch_cuda=cuda, nvcc=cuda)
    assert_advice(stack, {"causal-conv1d": (None, note), "mamba-ssm": (None, note), **REST})


@pytest.mark.parametrize(("capability", "cuda"), [("12.0", "12.8"), ("9.0", "12.6"), ("10.3", "13.0"), ("8.9", "11.8")])
def test_a_card_that_the_build_covers(capability, cuda):
    assert_advice(replace(AMPERE, capability=capability, torch_cuda=cuda, nvcc=cuda), ALL)


def test_the_compiler_must_be_of_torchs_cuda():
    note = "CUDA 13.0 toolkit"
    assert_advice(replace(AMPERE, nvcc=None), {"causal-conv1d": (CONV, note), "mamba-ssm": (MAMBA, note), **REST})
    note = "CUDA_HOME"
    assert_advice(replace(AMPERE, nvcc="12.4"), {"causal-conv1d": (CONV, note), "mamba-ssm": (MAMBA, note), **REST})


def test_triton_comes_with_torch():
    packages = {name: version for name, version in HAVE.items() if name != "triton"}
    command, note = lines(replace(AMPERE, packages=packages))["triton"]
    assert (command, "torch" in note) == ("pip install --force-reinstall torch==2.13.0", True)


def test_a_broken_build_is_built_again():
    stack = replace(AMPERE, packages={**HAVE, "mamba-ssm": "2.3.2.post1"}, broken=("mamba-ssm",))
    command, note = lines(stack)["mamba-ssm"]
    assert command == MAMBA.replace('isolation "', 'isolation --force-reinstall --no-deps --no-cache-dir "')
    assert "installed build does not work" in note


def test_the_pins_are_those_of_the_extras():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras["cuda"]) == {PINS[name] for name in PINS if name not in ("lm-eval", "tensorboard")}
    assert PINS["lm-eval"] in extras["eval"]
    assert PINS["tensorboard"] in extras["tensorboard"]

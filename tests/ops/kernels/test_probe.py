"""A probe tells a kernel that works from one that is not there, does not import, fails when it runs, or gives other
numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_packages import WORKING, calls, packages

from hybridlm.ops.kernels.probe import KERNELS, probe
from hybridlm.ops.kernels.rules import Sizes

HERE = torch.device("cpu")
SCANS = (
    "causal-conv1d",
    "selective scan",
    "SSD scan",
    "Mamba-2 layer",
    "Mamba-3 SISO",
    "Mamba-3 MIMO",
    "linear cross-entropy",
)


def conv_package(folder: Path, text: str) -> Path:
    (folder / "causal_conv1d").mkdir()
    (folder / "causal_conv1d/__init__.py").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", SCANS)
def test_one_that_works(name):
    with packages(*WORKING):
        found = probe(name, HERE, torch.bfloat16)
        assert len(calls()) == 1
        assert probe(name, HERE, torch.bfloat16) is found  # once per process
        assert calls() == []
    assert (found.ok, found.reason) == (True, None)
    assert found.seconds > 0


@pytest.mark.parametrize("name", ["SSD scan", "Mamba-2 layer", "Mamba-3 SISO", "Mamba-3 MIMO"])
def test_one_at_the_widths_of_a_layer(name):
    sizes = Sizes(heads=1, head_dim=32, d_state=64, width=3, rank=2, angles=32)
    with packages(*WORKING):
        found = probe(name, HERE, torch.bfloat16, sizes)
        assert found.ok, found.reason
        assert probe(name, HERE, torch.bfloat16) is not found


def test_none_is_installed(monkeypatch):
    monkeypatch.setattr("hybridlm.ops.kernels.probe.find_spec", lambda module: None)
    with packages():
        reasons = {name: probe(name, HERE, torch.bfloat16).reason for name in SCANS}
    assert reasons == {
        "causal-conv1d": "causal-conv1d is not installed",
        "linear cross-entropy": "liger-kernel is not installed",
        **dict.fromkeys(SCANS[1:-1], "mamba-ssm is not installed"),
    }


BREAKAGES = [
    ("raise ImportError('undefined symbol: _ZN3c10')", "cannot be imported (ImportError: undefined symbol: _ZN3c10)"),
    (
        "raise OSError('libcudart.so.12: cannot open shared object file')",
        "cannot be imported (OSError: libcudart.so.12: cannot open",
    ),
    (
        "raise SystemError('initialization of _C raised')",
        "fails when it runs (SystemError: initialization of _C raised)",
    ),
    ("", "cannot be imported (ImportError: cannot import name 'causal_conv1d_fn'"),
    (
        "def causal_conv1d_fn(x, weight): pass",
        "fails when it runs (TypeError: causal_conv1d_fn() got an unexpected keyword",
    ),
    (
        (
            "def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):\n    raise"
            " RuntimeError('CUDA error: no kernel image is available for execution on the device\\nCUDA kernel errors"
            " might')"
        ),
        "fails when it runs (RuntimeError: CUDA error: no kernel image is available for execution on the device)",
    ),
    (
        (
            "def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):\n   "
            " return 1.5 * x"
        ),
        "its results differ from torch's by ",
    ),
    (
        (
            "def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):\n"
            "    return x * float('nan') + 0 * (weight.sum() + bias.sum())"
        ),
        "its results differ from torch's by nan",
    ),
]


@pytest.mark.parametrize(("text", "reason"), BREAKAGES)
def test_one_that_is_broken(tmp_path, text, reason):
    with packages(conv_package(tmp_path, text)):
        found = probe("causal-conv1d", HERE, torch.bfloat16)
    assert not found.ok
    assert reason in found.reason
    assert "\n" not in found.reason


def test_wrong_gradients_are_noticed(tmp_path):
    text = (WORKING[0] / "causal_conv1d/__init__.py").read_text(encoding="utf-8")
    text = text.replace("return convolved(x, weight, bias,", "return convolved(x, weight.detach(), bias,")
    text = text.replace("from causal_conv1d.cpp_functions", "from fine.cpp_functions")
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine/cpp_functions.py").write_text(
        (WORKING[0] / "causal_conv1d/cpp_functions.py").read_text(encoding="utf-8")
    )
    with packages(conv_package(tmp_path, text)):
        assert probe("causal-conv1d", HERE, torch.bfloat16).reason.startswith("its results differ from torch's by inf")


def test_documents_that_are_mixed_up_are_noticed(tmp_path):
    text = (WORKING[0] / "causal_conv1d/__init__.py").read_text(encoding="utf-8")
    text = text.replace(
        "bias, seq_idx, initial_states, activation is not None)", "bias, None, initial_states, activation is not None)"
    )
    text = text.replace("from causal_conv1d.cpp_functions", "from fine.cpp_functions")
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine/cpp_functions.py").write_text(
        (WORKING[0] / "causal_conv1d/cpp_functions.py").read_text(encoding="utf-8")
    )
    with packages(conv_package(tmp_path, text)):
        assert "differ" in probe("causal-conv1d", HERE, torch.bfloat16).reason


def test_every_kernel_answers_without_an_exception():
    for name in KERNELS:
        found = probe(name, HERE, torch.bfloat16)
        assert found.ok == (found.reason is None)

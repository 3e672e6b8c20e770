"""Doctor as a user sees it: with nothing installed, with packages that work, and with ones that are broken."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import torch
from kernel_packages import WORKING, packages
from rich.console import Console

from hybridlm.machine.device import DeviceFacts, cpu_facts
from hybridlm.machine.doctor import Stack, examine, show

HERE = torch.device("cpu")
CARD = DeviceFacts("cuda", "NVIDIA GeForce RTX 4090", 24.0, "8.9", 99, True)
T4 = DeviceFacts("cuda", "Tesla T4", 15.0, "7.5", 64, False)
STACK = Stack(
    "Linux", "3.12.3", "2.13.0", "13.0", "580.65.06", "8.9", nvcc="13.0", packages={"mamba-ssm": "2.3.2.post1"}
)


def printed(findings) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(findings, console)
    return console.file.getvalue()


def working(findings) -> set[str]:
    return {found.name for found in findings.kernels if found.ok}


def test_packages_that_work():
    with packages(*WORKING):
        findings = examine(STACK, CARD, HERE, 1)
    assert {"causal-conv1d", "selective scan", "Mamba-2 layer", "Mamba-3 SISO", "linear cross-entropy"} <= working(
        findings
    )
    text = printed(findings)
    assert (
        "1 x NVIDIA GeForce RTX 4090, compute capability 8.9, 24.0 GiB, 99 KiB of shared memory per block, bfloat16"
        in text
    )
    assert "mamba-ssm" not in {line.package for line in findings.advice}


def test_a_card_without_bfloat16():
    with packages(*WORKING):
        assert "no bfloat16" in printed(examine(STACK, T4, HERE, 1))


def test_broken_packages(tmp_path):
    """One raises when it is imported, one when it runs."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm/__init__.py").write_text(
        "raise OSError('libc10_cuda.so: undefined symbol')", encoding="utf-8"
    )
    (tmp_path / "causal_conv1d").mkdir()
    head = "def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):"
    broken = f"{head}\n    raise RuntimeError('no kernel image')"
    (tmp_path / "causal_conv1d/__init__.py").write_text(broken, encoding="utf-8")
    with packages(tmp_path, *WORKING):
        findings = examine(STACK, CARD, HERE, 1)
    text = printed(findings)
    assert "mamba-ssm cannot be imported (OSError: libc10_cuda.so: undefined symbol)" in text
    assert "causal-conv1d fails when it runs (RuntimeError: no kernel image)" in text
    assert "linear cross-entropy" in working(findings)
    assert not {"causal-conv1d", "selective scan", "Mamba-2 layer"} & working(findings)
    assert findings.stack.broken == ("mamba-ssm",)  # the other is not among the installed ones of STACK
    assert '--force-reinstall --no-deps --no-cache-dir "mamba-ssm==2.3.2.post1"' in text
    json.dumps([vars(found) for found in findings.kernels])


def test_nothing_is_run_on_a_cpu(monkeypatch):
    monkeypatch.setattr("hybridlm.machine.doctor.probe", None)
    findings = examine(Stack("Linux", "3.11.7", "2.13.0", None, None, None), cpu_facts(), HERE, 0)
    assert {found.reason for found in findings.kernels} == {"needs a CUDA device"}
    assert not working(findings)


def test_the_command_here(environment):
    command = [sys.executable, "-m", "hybridlm", "doctor"]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    findings = json.loads(done.stdout)
    assert findings["stack"]["torch"] == torch.__version__.partition("+")[0]
    assert len(findings["kernels"]) == 10
    assert subprocess.run([*command, "--fast"], env=environment, capture_output=True, check=False).returncode == 2

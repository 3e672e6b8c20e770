"""What `hybridlm doctor` prints: tables of the machine, its kernels and packages, or the same as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hybridlm.machine.device import CUDA, DeviceFacts, device_facts, inference_device, system_bytes
from hybridlm.ops.kernels.probe import KERNELS, Probe, package_version, probe

PINS = {  # as in pyproject's extra `cuda`
    "causal-conv1d": "causal-conv1d==1.6.2.post1",
    "mamba-ssm": "mamba-ssm==2.3.2.post1",
    "liger-kernel": "liger-kernel==0.8.5",
    "bitsandbytes": "bitsandbytes>=0.45",
    "tensorboard": "tensorboard>=2.16",
    "lm-eval": "lm-eval>=0.4.13",
}
GAINS = {
    "causal-conv1d": "the convolution of every Mamba in one kernel",
    "mamba-ssm": "the scans of Mamba-1, -2 and -3 in a kernel each",
    "liger-kernel": "head and loss in one kernel",
    "bitsandbytes": "optim=adamw8bit",
    "triton": "trainer.compile=true, and all kernels written in it",
    "tensorboard": "logger=tensorboard",
    "lm-eval": "benchmarks of language models",
}
_EXTENSIONS = ("causal-conv1d", "mamba-ssm")
_EVERYWHERE = ("tensorboard", "lm-eval")
_BUILT_SINCE = {"10.0": 12.8, "12.0": 12.8, "10.3": 13.0, "11.0": 13.0, "12.1": 13.0}  # capability: CUDA
_OLDEST_CARD = 7.5


# Optional packages, by their names for pip.
OPTIONAL = (
    *("triton", "causal-conv1d", "mamba-ssm", "liger-kernel", "bitsandbytes"),
    *("wandb", "tensorboard", "datasets", "lm-eval", "transformers"),
)


@dataclass(frozen=True)
class Stack:
    """system: Linux, Windows or Darwin; torch_cuda: the CUDA version that torch was built with, None: a CPU build;
    driver: NVIDIA's version, None: not found; capability: the card's, such as 8.6; nvcc: the CUDA version of the
    compiler, None: not found; packages: name to version; broken: those of them without a working kernel."""

    system: str
    python: str
    torch: str
    torch_cuda: str | None
    driver: str | None
    capability: str | None
    nvcc: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    broken: tuple[str, ...] = ()


def stack_here(facts: DeviceFacts) -> Stack:
    """This machine's stack. Runs only nvidia-smi and nvcc, if they exist: of CUDA_HOME, which a build would use."""
    home = os.environ.get("CUDA_HOME")
    return Stack(
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        torch_cuda=torch.version.cuda,
        driver=_found(r"(\S+)", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        capability=facts.capability if facts.kind == CUDA else None,
        nvcc=_found(r"release ([\d.]+)", str(Path(home) / "bin/nvcc") if home else "nvcc", "--version"),
        packages={name: version for name in OPTIONAL if (version := package_version(name)) is not None},
    )


def _found(pattern: str, *command: str) -> str | None:
    """The first match in what a program prints; None: it is missing, fails or hangs."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(pattern, printed)
    return match and match[1]


@dataclass(frozen=True)
class Line:
    """What is missing, what it is for, and the command that installs it; None: not available, for the reason in
    ``note``."""

    package: str
    gives: str
    command: str | None
    note: str | None = None


def advice(stack: Stack) -> list[Line]:
    """A line for everything useful that is missing, in the order in which to install it."""
    return _for_the_card(stack) + [_pip(name) for name in _EVERYWHERE if name not in stack.packages]


def _pip(name: str, option: str = "") -> Line:
    return Line(name, GAINS[name], f'pip install {option}"{PINS[name]}"')


def _for_the_card(stack: Stack) -> list[Line]:
    windows, torch_build = stack.system == "Windows", f"torch {stack.torch}"
    if stack.system == "Darwin":
        return [Line("kernels", "compiled kernels", None, "macOS has no CUDA: torch operators are used")]
    if stack.driver is None and stack.capability is None:
        return [Line("kernels", "compiled kernels", None, "no NVIDIA driver found: torch operators are used")]
    if stack.torch_cuda is None and windows:
        note = "use the command from pytorch.org/get-started/locally for Windows, Pip and CUDA 13.0"
        return [Line("torch", "the card", None, note)]
    if stack.torch_cuda is None:
        note = f"{torch_build} is a CPU build; run doctor again afterwards"
        return [Line("torch", "the card", f'pip install --force-reinstall "torch=={stack.torch}"', note)]
    if stack.capability is None:
        note = f"{torch_build} (CUDA {stack.torch_cuda}) finds no card: update the NVIDIA driver"
        return [Line("driver", "the card", None, note)]
    lines = []
    if not stack.packages.keys() & {"triton", "triton-windows"}:
        command = "pip install triton-windows" if windows else f"pip install --force-reinstall torch=={stack.torch}"
        lines.append(Line("triton", GAINS["triton"], command, None if windows else "part of torch's CUDA build"))
    for name in _EXTENSIONS:
        if name not in stack.packages or name in stack.broken:
            lines.append(_extension(stack, name, stack.torch_cuda, stack.capability))
    if "liger-kernel" not in stack.packages:
        lines.append(_pip("liger-kernel", "--no-deps " if windows else ""))
    if "bitsandbytes" not in stack.packages:
        lines.append(_pip("bitsandbytes"))
    return lines


def _extension(stack: Stack, name: str, cuda: str, capability: str) -> Line:
    """A package with CUDA code, compiled on installation unless its authors provide a wheel for exactly this stack."""
    needed, obstacle = _BUILT_SINCE.get(capability, 11.8), None
    if stack.system == "Windows":
        obstacle = "not available on Windows; in WSL2 it installs as on Linux"
    elif float(capability) < _OLDEST_CARD:
        obstacle = f"needs compute capability 7.5 or newer; this card has {capability}"
    elif float(cuda) < needed:
        obstacle = f"this card needs a torch build with CUDA {needed:.1f} or newer; this one has {cuda}"
    if obstacle is not None:
        return Line(name, GAINS[name], None, obstacle)
    note = "may compile for minutes (nine architectures); set MAX_JOBS=2 if memory is short"
    if name in stack.broken:
        note = f"the installed build does not work; {note}"
    if stack.nvcc is None:
        note = f"no nvcc found: install the CUDA {cuda} toolkit first"
    elif stack.nvcc.partition(".")[0] != cuda.partition(".")[0]:
        note = f"nvcc is of CUDA {stack.nvcc}, torch of {cuda}: set CUDA_HOME to torch's first"
    again = "--force-reinstall --no-deps --no-cache-dir " if name in stack.broken else ""
    command = f'pip install ninja packaging setuptools wheel && pip install --no-build-isolation {again}"{PINS[name]}"'
    return Line(name, GAINS[name], command, note)


NO_CARD = "needs a CUDA device"


@dataclass(frozen=True)
class Findings:
    """All that doctor finds, as plain values for JSON."""

    stack: Stack
    card: DeviceFacts
    cards: int
    cores: int | None
    memory_gib: float | None
    kernels: list[Probe]
    advice: list[Line]


def examine(stack: Stack, card: DeviceFacts, device: torch.device, cards: int) -> Findings:
    """Runs every kernel on ``device`` if ``card`` is a CUDA one. Does not raise for missing or broken packages."""
    dtype, memory = torch.bfloat16 if card.bf16 else torch.float16, system_bytes()
    kernels = [
        probe(name, device, dtype)
        if card.kind == CUDA
        else Probe(name, False, NO_CARD, 0.0, package_version(kernel.package or "torch"))
        for name, kernel in KERNELS.items()
    ]
    working = {KERNELS[found.name].package for found in kernels if found.ok}
    tried = {KERNELS[found.name].package for found in kernels if card.kind == CUDA}
    stack = replace(stack, broken=tuple(name for name in stack.packages if name in tried - working))
    gib = None if memory is None else memory / 2**30
    return Findings(stack, card, cards, os.cpu_count(), gib, kernels, advice(stack))


def run_doctor(*, as_json: bool) -> None:
    """Prints the findings for this machine."""
    card = device_facts()
    cards = torch.cuda.device_count() if card.kind == CUDA else 0
    findings = examine(stack_here(card), card, inference_device(), cards)
    if as_json:
        print(json.dumps(asdict(findings), indent=2))
    else:
        show(findings, Console())


def show(findings: Findings, console: Console) -> None:
    """Prints the findings as tables, then what to install."""
    packages = findings.stack.packages
    for header, rows in (
        (("machine", ""), _machine(findings)),
        (("kernel", "version", "works", "time", "why not"), [_row(found) for found in findings.kernels]),
        (("optional package", "version"), [(name, packages.get(name, "not installed")) for name in OPTIONAL]),
    ):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in header:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, "")
    console.print("[bold]to install[/bold]" if findings.advice else "nothing to install")
    for line in findings.advice:
        console.print(f"  {line.package}: {line.gives}", highlight=False)
        for text in filter(None, (line.note, line.command)):
            console.print(f"    {text}", highlight=False, soft_wrap=True, markup=False)


def _machine(findings: Findings) -> list[tuple[str, str]]:
    stack, card = findings.stack, findings.card
    memory = "unknown" if findings.memory_gib is None else f"{findings.memory_gib:.1f} GiB"
    gpu = "none"
    if card.kind == CUDA:
        shared = "" if card.shared_memory_kb is None else f", {card.shared_memory_kb} KiB of shared memory per block"
        size = "" if card.memory_gb is None else f", {card.memory_gb:.1f} GiB"
        bf16 = "bfloat16" if card.bf16 else "no bfloat16"
        gpu = f"{findings.cards} x {card.name}, compute capability {card.capability}{size}{shared}, {bf16}"
    built = "CPU build" if stack.torch_cuda is None else f"built for CUDA {stack.torch_cuda}"
    return [
        ("system", f"{stack.system} {platform.machine()}, {findings.cores} cores, {memory}"),
        ("Python", stack.python),
        ("torch", f"{stack.torch}, {built}"),
        ("NVIDIA driver", stack.driver or "not found"),
        ("nvcc", stack.nvcc or "not found"),
        ("card", gpu),
    ]


def _row(found: Probe) -> tuple[str, ...]:
    seconds = f"{found.seconds:.1f} s" if found.seconds else ""
    return found.name, found.version or "", "yes" if found.ok else "no", seconds, found.reason or ""

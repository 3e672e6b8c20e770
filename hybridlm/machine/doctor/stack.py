"""A machine in the terms that decide what can be installed on it: described by a test, or read here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata

from hybridlm.machine.device import CUDA, DeviceFacts

# Of the packages that hybridlm can use beyond those it needs; each by its name for pip.
OPTIONAL = (
    *("triton", "causal-conv1d", "mamba-ssm", "liger-kernel", "bitsandbytes", "torchao"),
    *("wandb", "tensorboard", "datasets", "lm-eval", "transformers"),
)


@dataclass(frozen=True)
class Stack:
    """system: Linux, Windows or Darwin; torch_cuda: the CUDA version torch was built with, None: a CPU build; driver:
    NVIDIA's, None: not found; capability: of the card, as 8.6; nvcc: the CUDA version of the compiler found, None:
    none; packages: name to version; broken: of these, those of which no kernel works."""

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
    """This machine. Nothing but a few programs of NVIDIA's is run, and none need be there."""
    import torch

    return Stack(
        system=platform.system(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
        torch=torch.__version__.partition("+")[0],
        torch_cuda=torch.version.cuda,
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        capability=facts.capability if facts.kind == CUDA else None,
        nvcc=_nvcc(),
        packages={name: version for name in OPTIONAL if (version := _version(name)) is not None},
    )


def memory_gib() -> float | None:
    """Of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    """The release of the CUDA compiler that a build would find: 12.8 of "release 12.8, V12.8.93"."""
    home = os.environ.get("CUDA_HOME")
    program = os.path.join(home, "bin", "nvcc") if home else "nvcc"
    lines = _run(program, "--version")
    for line in lines:
        if "release" in line:
            return line.partition("release")[2].partition(",")[0].strip()
    return None


def _first_line(*command: str) -> str | None:
    return next(iter(_run(*command)), None)


def _run(*command: str) -> list[str]:
    """The lines a program prints; none where it is not there, fails, or does not end."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]

"""What decides which packages can be installed on a machine: described by a test, or read from this one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field

import torch

from hybridlm.machine.device import CUDA, DeviceFacts
from hybridlm.ops.kernels.probe import package_version

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
    """This machine's stack. Runs only nvidia-smi and nvcc, if they exist."""
    return Stack(
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        torch_cuda=torch.version.cuda,
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        capability=facts.capability if facts.kind == CUDA else None,
        nvcc=_nvcc(),
        packages={name: version for name in OPTIONAL if (version := package_version(name)) is not None},
    )


def _nvcc() -> str | None:
    """The release of the CUDA compiler that a build would use: 12.8 from "release 12.8, V12.8.93"."""
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
    """The lines that a program prints; none if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]

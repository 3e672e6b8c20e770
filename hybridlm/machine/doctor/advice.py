"""What to install on a stack, as shell commands: a function of its description alone.

Facts: causal-conv1d 1.6.2 and mamba-ssm 2.3.2 are source packages that build for compute capability 7.5, 8.0, 8.7, from
CUDA 11.8 on 9.0, from 12.8 on 10.0 and 12.0, from 13.0 on 10.3, 11.0 and 12.1 (their setup.py); a card runs what was
built for an earlier one of its major version. They import torch to build and need the nvcc of torch's CUDA, on Linux
only. torch's package is a CUDA build on Linux and a CPU build on Windows; Triton comes with it on Linux, and on Windows
as triton-windows.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridlm.machine.doctor.stack import Stack

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
    lines = _for_the_card(stack)
    return lines + [_pip(name) for name in _EVERYWHERE if name not in stack.packages]


def _pip(name: str, note: str | None = None) -> Line:
    return Line(name, GAINS[name], f'pip install "{PINS[name]}"' if name in PINS else f"pip install {name}", note)


def _for_the_card(stack: Stack) -> list[Line]:
    if stack.system == "Darwin":
        return [Line("kernels", "compiled kernels", None, "macOS has no CUDA: torch operators are used")]
    if stack.driver is None and stack.capability is None:
        return [Line("kernels", "compiled kernels", None, "no NVIDIA driver found: torch operators are used")]
    if stack.torch_cuda is None:
        return [_torch(stack)]
    if stack.capability is None:
        return [
            Line(
                "driver",
                "the card",
                None,
                f"torch {stack.torch} (CUDA {stack.torch_cuda}) finds no card: update the NVIDIA driver",
            )
        ]
    lines = []
    if "triton" not in stack.packages and "triton-windows" not in stack.packages:
        windows = stack.system == "Windows"
        command = "pip install triton-windows" if windows else f"pip install --force-reinstall torch=={stack.torch}"
        lines.append(Line("triton", GAINS["triton"], command, None if windows else "part of torch's CUDA build"))
    lines += [_extension(stack, name) for name in _EXTENSIONS if name not in stack.packages or name in stack.broken]
    if "liger-kernel" not in stack.packages:
        windows = stack.system == "Windows"
        command = (
            f'pip install --no-deps "{PINS["liger-kernel"]}"' if windows else f'pip install "{PINS["liger-kernel"]}"'
        )
        lines.append(Line("liger-kernel", GAINS["liger-kernel"], command))
    return lines + [_pip(name) for name in ("bitsandbytes",) if name not in stack.packages]


def _torch(stack: Stack) -> Line:
    """For a driver that torch cannot use."""
    if stack.system == "Windows":
        note = "use the command from pytorch.org/get-started/locally for Windows, Pip and CUDA 13.0"
        return Line("torch", "the card", None, note)
    command = f'pip install --force-reinstall "torch=={stack.torch}"'
    return Line("torch", "the card", command, f"torch {stack.torch} is a CPU build; run doctor again afterwards")


def _extension(stack: Stack, name: str) -> Line:
    """A package with CUDA code, compiled on installation unless its authors provide a wheel for exactly this stack."""
    assert stack.torch_cuda is not None
    assert stack.capability is not None
    gives, cuda = GAINS[name], float(stack.torch_cuda)
    if stack.system == "Windows":
        return Line(name, gives, None, "not available on Windows; in WSL2 it installs as on Linux")
    if float(stack.capability) < _OLDEST_CARD:
        return Line(name, gives, None, f"needs compute capability 7.5 or newer; this card has {stack.capability}")
    needed = _BUILT_SINCE.get(stack.capability, 11.8)
    if cuda < needed:
        return Line(
            name,
            gives,
            None,
            f"this card needs a torch build with CUDA {needed:.1f} or newer; this one has {stack.torch_cuda}",
        )
    again = "--force-reinstall --no-deps --no-cache-dir " if name in stack.broken else ""
    command = f'pip install ninja packaging setuptools wheel && pip install --no-build-isolation {again}"{PINS[name]}"'
    if stack.nvcc is None:
        return Line(
            name,
            gives,
            command,
            f"no nvcc found: install the CUDA {stack.torch_cuda} toolkit first",
        )
    if stack.nvcc.partition(".")[0] != stack.torch_cuda.partition(".")[0]:
        return Line(
            name,
            gives,
            command,
            f"nvcc is of CUDA {stack.nvcc}, torch of {stack.torch_cuda}: set CUDA_HOME to torch's first",
        )
    built = "the installed build does not work; " if again else ""
    return Line(
        name,
        gives,
        command,
        f"{built}may compile for minutes (nine architectures); set MAX_JOBS=2 if memory is short",
    )

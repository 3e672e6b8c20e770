"""Runs in a process of its own, without asserts (-O) and with TRITON_INTERPRET=1: trials of the real Triton kernels on
the CPU.

    python -O interpreted.py FOLDER        FOLDER: for a copy of mamba_ssm; prints the largest relative difference of
    each trial, as JSON

Triton's interpreter has no bfloat16 arithmetic, no inline assembly and no CUDA device. A copy of mamba_ssm's sources
therefore has float32 in place of bfloat16 and torch's own functions in place of the four approximations, and autotuning
takes the first setting.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import shutil
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import torch

APPROXIMATIONS = {
    "cos_approx": "tl.cos(x)",
    "sin_approx": "tl.sin(x)",
    "tanh_approx": "2 * tl.sigmoid(2 * x) - 1",
    "sech2_approx": "1 - (2 * tl.sigmoid(2 * x) - 1) * (2 * tl.sigmoid(2 * x) - 1)",
}


def copied(folder: Path) -> None:
    """mamba_ssm in ``folder``, changed as above, in front of everything."""
    spec = find_spec("mamba_ssm")
    if spec is None or spec.origin is None:
        raise SystemExit("mamba_ssm is not installed")
    package = folder / "mamba_ssm"
    shutil.copytree(Path(spec.origin).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (package / "__init__.py").write_text("", encoding="utf-8")  # which would import the compiled part
    for path in (package / "ops/triton/mamba3").glob("*.py"):
        text = (
            path.read_text(encoding="utf-8")
            .replace("tl.bfloat16", "tl.float32")
            .replace("torch.bfloat16", "torch.float32")
        )
        if path.name == "utils.py":
            for name, formula in APPROXIMATIONS.items():
                text, count = re.subn(
                    rf"def {name}\(x\):.*?(?=\n@triton|\Z)",
                    f"def {name}(x):\n    return {formula}\n",
                    text,
                    flags=re.DOTALL,
                )
                if count != 1:
                    raise SystemExit(f"mamba_ssm has another {name}")
        path.write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))


def without_cuda() -> None:
    from triton.runtime.autotuner import Autotuner

    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=4)
    for item in gc.get_objects():
        if type(item) is Autotuner:
            item.configs = item.configs[:1]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # or the rules keep float32 from Triton
    copied(Path(folder))
    import mamba_ssm.ops.triton.mamba3.mamba3_siso_combined
    import mamba_ssm.ops.triton.ssd_combined  # noqa: F401

    without_cuda()
    from hybridlm.ops.kernels import trials
    from hybridlm.ops.kernels.rules import Sizes

    sizes = Sizes(batch=2, time=20)
    here, fp32 = torch.device("cpu"), torch.float32
    found = {
        "SSD": trials.mamba2(here, fp32, sizes),
        "Mamba-2 layer": trials.mamba2_layer(here, fp32, sizes),
        "SISO": trials.siso(here, fp32, sizes, documents=False),
        "SISO, documents": trials.siso(here, fp32, sizes),
        "loss": trials.loss(here, fp32),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Our calls through the real Triton kernels, in Triton's interpreter, where mamba-ssm and liger-kernel are installed.
Without CUDA:

pip install triton einops liger-kernel==0.8.5
MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_same_numbers(environment, tmp_path):
    """Outputs and gradients in float32; mamba-ssm's layer in one kernel has its convolution from the package that
    stands in."""
    for package in ("triton", "mamba_ssm", "liger_kernel", "einops"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    path = os.pathsep.join([str(HERE / "fakes/conv"), *filter(None, [environment.get("PYTHONPATH")])])
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-O", str(HERE / "interpreted.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found) == {"SSD", "Mamba-2 layer", "SISO", "SISO, documents", "loss"}
    assert {name: value for name, value in found.items() if not value < 1e-5} == {}

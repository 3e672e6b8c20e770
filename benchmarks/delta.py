"""The gated delta rule of hybridlm.ops, forward and backward, against transformers' torch form and hybridlm's own scan
of Mamba-2.

Two rows of 512 tokens, fp32. gdn: one decay per head, the form of Qwen3-Next; kda: one per channel of the keys, that of
Kimi Linear. The scan is given as many B and C as the rule has keys and queries. It is the goal for gdn alone: a decay
per channel has no such sibling.

python benchmarks/delta.py [--rounds N]      prints the tables and writes benchmarks/results/delta_gdn.md and
delta_kda.md
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from harness.report import BOUNDS, bound_row, run, table
from harness.turns import LeftOut, take_turns
from torch import Tensor

from hybridlm.ops.delta import gated_delta
from hybridlm.ops.ssd import ssd

BATCH, TIME = 2, 512
SHAPES = ((8, 64, 64), (4, 64, 128))  # heads, channels of a key and of a value


def _peer(kind: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    try:
        from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError as error:
        raise LeftOut(f"this needs a transformers that has both models ({error})") from error
    return partial(
        torch_chunk_gated_delta_rule if kind == "gdn" else chunk_kimi_delta_attention, use_qk_l2norm_in_kernel=True
    )


def _step(function: Callable[..., tuple[Tensor, Tensor | None]], *inputs: Tensor) -> Callable[[], object]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    upstream = torch.randn(BATCH, TIME, *inputs[2].shape[2:])
    return lambda: torch.autograd.grad(function(*leaves)[0], leaves, upstream)


def _scan(q: Tensor, k: Tensor, v: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    heads = v.shape[2]
    return ssd(v, dt, -torch.linspace(0.1, 1, heads), k, q, torch.ones(heads))


def measure(kind: str, rounds: int) -> list[str]:
    peer, rows, bounds = _peer(kind), [], []
    for heads, key, value in SHAPES:
        q, k, v = (torch.randn(BATCH, TIME, heads, width) for width in (key, key, value))
        decay = -F.softplus(torch.randn(BATCH, TIME, heads, *((key,) if kind == "kda" else ())) - 2)
        inputs = (q, k, v, decay, torch.rand(BATCH, TIME, heads))
        contenders = {
            "hybridlm": _step(gated_delta, *inputs),
            "transformers": _step(peer, *inputs),
            "scan of Mamba-2": _step(_scan, q, k, v, F.softplus(torch.randn(BATCH, TIME, heads))),
        }
        times = take_turns(contenders, rounds)
        shape = f"{heads} heads of {key} x {value}"
        rows.append([shape, *(f"{1e3 * times.median(name):.1f}" for name in contenders)])
        bounds.append(
            bound_row(f"{shape}: transformers / hybridlm", times.ratio("transformers", "hybridlm"), 1.5, 2, "more")
        )
        if kind == "gdn":
            bounds.append(
                bound_row(f"{shape}: hybridlm / scan", times.ratio("hybridlm", "scan of Mamba-2"), 2, 1.5, "less")
            )
    header = ("shape", *(f"{name}, ms" for name in contenders))
    return [f"B={BATCH}, T={TIME}, {rounds} rounds", "", *table(header, rows), "", *table(BOUNDS, bounds)]


if __name__ == "__main__":
    run("delta", __doc__, {kind: partial(measure, kind) for kind in ("gdn", "kda")})

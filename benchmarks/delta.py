"""The gated delta rule of hybridlm.ops, forward and backward, against transformers' torch form and hybridlm's own scan
of Mamba-2; and the layers around it against that of Mamba-2.

Two rows of 512 tokens, fp32. gdn: one decay per head, the form of Qwen3-Next; kda: one per channel of the keys, that of
Kimi Linear. The scan is given as many B and C as the rule has keys and queries. It is the goal for gdn alone: a decay
per channel has no such sibling. layers: forward and backward of a whole layer of 512 channels with 8 heads of 64 x 64;
Mamba-2's has as many groups, so that it has as many weights as gated DeltaNet's; one group is shown beside it.

Times are CPU seconds of the process, which neighbours on a shared machine move less than they move the time that
passes; with one thread the two are the same on an idle one.

python benchmarks/delta.py [--rounds N]      prints the tables and writes benchmarks/results/delta_*.md
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from harness.report import BOUNDS, bound_row, run, table
from harness.turns import LeftOut, take_turns
from torch import Tensor

from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.layers.init import Init
from hybridlm.layers.layer import layer_class
from hybridlm.layers.sequence import SequenceInfo
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
        torch.set_num_threads(1)
        times = take_turns(contenders, rounds, clock=time.process_time)
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
    return [f"B={BATCH}, T={TIME}, 1 thread, {rounds} rounds", "", *table(header, rows), "", *table(BOUNDS, bounds)]


LAYERS: dict[str, tuple[str, dict[str, object]]] = {
    "gated DeltaNet": ("gdn", {}),
    "Kimi Delta Attention": ("kda", {}),
    "Mamba-2, 8 groups": ("mamba2", {"expand": 1, "n_groups": 8}),
    "Mamba-2, 1 group": ("mamba2", {"expand": 1}),
}


def measure_layers(rounds: int) -> list[str]:
    model, contenders, weights = ModelConfig(d_model=512), {}, {}
    seq = SequenceInfo.contiguous(BATCH, TIME, 0, torch.device("cpu"))
    for name, (kind, options) in LAYERS.items():
        spec = MIXERS[kind].model_validate(options).resolve(model, kind)
        layer = layer_class(spec)(spec)
        layer.reset_parameters(Init(std=None, residual="depth", n_layers=8))
        weights[name] = sum(parameter.numel() for parameter in layer.parameters())
        x, upstream = torch.randn(BATCH, TIME, 512, requires_grad=True), torch.randn(BATCH, TIME, 512)
        leaves = [x, *layer.parameters()]
        contenders[name] = partial(_layer_step, layer, seq, leaves, upstream)
    torch.set_num_threads(1)
    times = take_turns(contenders, rounds, clock=time.process_time)
    rows = [[name, f"{weights[name]:,}", f"{1e3 * times.median(name):.1f}"] for name in contenders]
    bounds = [
        bound_row(f"{name} / Mamba-2, 8 groups", times.ratio(name, "Mamba-2, 8 groups"), 2, 1.5, "less")
        for name in list(contenders)[:2]
    ]
    header = ("layer", "parameters", "step, ms")
    return [f"B={BATCH}, T={TIME}, 1 thread, {rounds} rounds", "", *table(header, rows), "", *table(BOUNDS, bounds)]


def _layer_step(layer: torch.nn.Module, seq: SequenceInfo, leaves: list[Tensor], upstream: Tensor) -> object:
    return torch.autograd.grad(layer(leaves[0], seq), leaves, upstream)


if __name__ == "__main__":
    run("delta", __doc__, {kind: partial(measure, kind) for kind in ("gdn", "kda")} | {"layers": measure_layers})

"""FLOPs that the model announces against the products that torch's counter sees in a real forward and backward.

The counter does not look into hybridlm's own operators: here their bodies are counted, too. It counts matrix products
alone, so that the convolutions and what Mamba-1 writes into its state, which are none, are taken off what is announced.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_models import VOCAB, make_ids, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridlm import ops
from hybridlm.config.mixers.attention import AttentionConfig, AttentionSpec
from hybridlm.config.mixers.mamba1 import Mamba1Spec
from hybridlm.config.mixers.mamba2 import Mamba2Spec
from hybridlm.config.mixers.mamba3 import Mamba3Spec
from hybridlm.config.mixers.mla import MLASpec
from hybridlm.config.resolve import resolve_layers
from hybridlm.model.build import build_model
from hybridlm.model.count import flops_per_token
from hybridlm.model.lm import HybridLM

BATCH, TIME = 4, 40  # a multiple of the chunks of small_models: a tile that is cut off is multiplied as a whole


def operator_bodies() -> dict[Any, Callable[..., Any]]:
    """Of every operator of hybridlm: what its body multiplies."""
    bodies: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.addmm_: lambda total, a, b, *, out_shape: (
            2 * a[0] * a[1] * b[1]
        ),  # torch's counter knows only the forms that
        torch.ops.aten.baddbmm_: lambda total, a, b, *, out_shape: 2 * a[0] * a[1] * a[2] * b[2],  # allocate
    }
    for module in pkgutil.iter_modules(ops.__path__):
        for item in vars(importlib.import_module(f"hybridlm.ops.{module.name}")).values():
            if isinstance(item, torch.library.CustomOpDef):
                bodies[item._opoverload.overloadpacket] = counted(item._init_fn)
    return bodies


def counted(body: Callable[..., Any]) -> Callable[..., int]:
    def flops(*arguments: Any, out_val: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=operator_bodies()) as inner:
            body(*arguments)
        return inner.get_total_flops()

    flops._get_raw = True  # the tensors themselves, not their shapes
    return flops


@dataclass(frozen=True)
class Seen:
    forward: float  # per token
    train: float


def seen(model: HybridLM) -> Seen:
    ids = make_ids(BATCH, TIME)
    counts = []
    for backward in (False, True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=operator_bodies()) as counter:
            if backward:
                output = model(ids, targets=ids)
                output.loss_sum.backward()
            else:
                with torch.no_grad():
                    model(ids)
        counts.append(counter.get_total_flops() / (BATCH * TIME))
    return Seen(*counts)


def without_products(model: HybridLM) -> float:
    """Announced forward FLOPs per token that are no matrix products in the torch path."""
    total = 0.0
    for layer in resolve_layers(model.config):
        spec = layer.params
        if isinstance(spec, (Mamba2Spec, Mamba3Spec)):
            total += 2 * spec.d_conv * spec.conv_channels
        elif isinstance(spec, Mamba1Spec):
            total += (
                2 * spec.d_conv * spec.d_inner + 2 * spec.d_inner * spec.d_state
            )  # it is written by a loop and read by a product
    return total


def masked_products(model: HybridLM) -> float:
    """Forward FLOPs per token of keys that the counter sees and the mask hides: the counter's square less what is
    announced."""
    total = 0.0
    for layer in resolve_layers(model.config):
        spec = layer.params
        if isinstance(spec, AttentionSpec):
            window = spec.window or TIME
            hidden = TIME - sum(min(t + 1, window) for t in range(TIME)) / TIME
            total += 4 * spec.n_heads * spec.head_dim * hidden
        elif isinstance(spec, MLASpec):
            per_key = 2 * spec.n_heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim + spec.v_head_dim)
            total += per_key * (TIME - 1) / 2
    return total


def model_of(pattern: str, **sections: Any) -> HybridLM:
    torch.manual_seed(0)
    model = build_model(small_config(pattern, **sections), VOCAB).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


WINDOWED = {"attention": AttentionConfig(n_heads=2, n_kv_heads=1, window=5)}
EXACT = {
    "attention": ("T:none", {}),
    "attention and mlp": ("T:mlp", {}),
    "window": ("T:none", WINDOWED),
    "mla": ("L:none", {}),
    "mixture of experts": ("T:moe", {}),
    "mla and a mixture": ("L:moe", {}),
    "mamba1": ("M1:none", {}),
    "mamba2": ("M2:none", {}),
    "mamba2 and mlp": ("M2:mlp", {}),
    "mamba3": ("M3:none", {}),
    "mimo": ("X:none", {}),
    "untied": ("T:none M2:none", {"tie_embeddings": False}),
    "all": ("M1 M2 M3 T L:moe", {}),
}


@pytest.mark.parametrize(("pattern", "sections"), EXACT.values(), ids=EXACT)
def test_a_forward_multiplies_what_is_announced(pattern, sections):
    model = model_of(pattern, **sections)
    announced = flops_per_token(model, TIME, "prefill")
    assert seen(model).forward == pytest.approx(announced - without_products(model) + masked_products(model), rel=1e-9)


@pytest.mark.parametrize("name", ["attention", "attention and mlp", "window", "mla", "mixture of experts"])
def test_a_training_step_multiplies_three_forwards(name):
    """Exactly where the backward recomputes nothing; what it recomputes is no useful work and is not announced
    (below)."""
    pattern, sections = EXACT[name]
    model = model_of(pattern, **sections)
    announced = flops_per_token(model, TIME, "train")
    assert seen(model).train == pytest.approx(announced + 3 * masked_products(model), rel=1e-9)


@pytest.mark.parametrize("pattern", ["M2:none", "M3:none", "X:none"])
def test_a_scan_multiplies_no_less_than_is_announced(pattern):
    """perf/mfu counts no work that was not done. The backward multiplies some scores a second time."""
    model = model_of(pattern)
    announced = flops_per_token(model, TIME, "train") - 3 * without_products(model)
    assert announced <= seen(model).train <= 1.1 * announced

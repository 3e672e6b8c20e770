"""The gate's rows that hold for every kind of layer: initial weights, declared parameters, and costs.

How each kind draws its weights, and its exact FLOPs, are facts of the kind, which its own tests assert. The
bounds here are wide: they catch a forgotten factor, or the cost of a sequence given as that of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridlm.config.layers import LayerSpec
from hybridlm.eval.gate_subject import Subject, Worst, build_layers, logits_of
from hybridlm.layers.layer import Phase, linear_flops
from hybridlm.layers.mixer import Mixer
from hybridlm.machine.device import CPU
from hybridlm.model import count
from hybridlm.model.block import Block
from hybridlm.model.cache import ModelCache
from hybridlm.model.columns import sequence_info
from hybridlm.model.lm import HybridLM

_ROWS = 8  # so that a projection of a few tokens is still a product of matrices
_PER_STATE = 64  # FLOPs per token, at most, for each number of a state


def initial_weights(full: HybridLM, subject: Subject) -> Worst:
    """The layers of the subject with the recipe of ``full``, filled with NaN and drawn."""
    worst = Worst()
    model = build_layers(subject.layers, full.config, full).to_empty(device=CPU)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
        model.reset_parameters()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            worst.see(0.0 if bool(tensor.isfinite().all()) else math.inf, f"{name} is not drawn, or not finite")
    return worst


def parameters(full: HybridLM, places: Mapping[LayerSpec, Sequence[int]]) -> Worst:
    """Every parameter is declared, row blocks add up to the rows, and equal layers have equally many.

    places: each distinct layer of ``full`` with its places.
    """
    worst, by_name = Worst(), dict(full.named_parameters())
    for name, spec in full.param_specs().items():  # raises where a parameter is not declared, or one does not exist
        if spec.row_blocks:
            worst.see(abs(sum(spec.row_blocks) - by_name[name].shape[-2]), f"rows of the blocks of {name}")
    built = build_layers(list(places), full.config, full).blocks
    inside = sum(count.parameters(block) * len(at) for block, at in zip(built, places.values(), strict=True))
    ends = full.embedding.weight.numel() * (1 if full.lm_head is None else 2) + full.config.d_model
    worst.see(abs(inside + ends - count.parameters(full)), "the sum over embedding, layers, norm and head")
    return worst


def state_bytes(subject: Subject) -> Worst:
    """What ``state_bytes`` announces against a cache that has been filled."""
    worst, rows = Worst(), subject.text.shape[0]
    for tokens in sorted({1, 7, subject.plan.tokens // 2, subject.plan.tokens}):
        cache = subject.model.new_cache(rows, tokens)
        with torch.no_grad():
            logits_of(subject.model(subject.text[:, :tokens], cache=cache, keep="last"))
        announced = count.state_bytes(subject.model, tokens, rows, torch.float64)
        message = f"{rows} rows of {tokens} tokens: {announced} announced, {cache.bytes} held"
        worst.see(abs(announced - cache.bytes), message)
    return worst


def flops(full: HybridLM, layers: Sequence[LayerSpec]) -> Worst:
    """Each distinct layer of ``full``: training costs three forwards; a token costs a mixer its projections at least,
    and at most twice the products that torch sees and ``_PER_STATE`` for each number of its state. Errors are the
    excess over a bound, as a share of it."""
    worst = Worst()
    context = 2 * max((getattr(spec.params, "chunk", 0) for spec in layers), default=0) + 19
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # nothing is computed; attention's products are seen
        for spec, block in zip(layers, build_layers(layers, full.config, full, device=CPU).blocks, strict=True):
            mixer, ffn = cast(Block, block).mixer, cast(Block, block).ffn
            prefill, trained = mixer.flops(context, "prefill"), mixer.flops(context, "train")
            worst.see(_beyond(trained, 3 * prefill, 3 * prefill), f"{spec.kind}: training, three times the forward")
            _mixer_flops(mixer, spec, context, worst)
            if ffn is not None:  # no parameter meets a token twice
                prefill, trained = ffn.flops("prefill"), ffn.flops("train")
                worst.see(_beyond(trained, 3 * prefill, 3 * prefill), f"{spec.ffn_kind}: training")
                worst.see(_beyond(prefill, _projections(ffn), 2.0 * count.parameters(ffn)), f"{spec.ffn_kind}")
    return worst


def _mixer_flops(mixer: Mixer, spec: LayerSpec, context: int, worst: Worst) -> None:
    device = torch.device(CPU)
    layer = mixer.new_cache(_ROWS, context + 1, dtype=torch.float32, device=device)
    cache = ModelCache([layer], _ROWS, device)
    state = 0.0 if layer.has_columns else cache.bytes / torch.float32.itemsize / _ROWS
    phases: tuple[tuple[Phase, int, ModelCache | None], ...] = (("prefill", context, None), ("decode", 1, cache))
    cache.past = context
    for phase, tokens, past in phases:
        x = torch.empty(_ROWS, tokens, spec.params.d_model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixer(x, sequence_info(tokens, past, None, None, x[..., 0].long()), past and layer)
        seen = counter.get_total_flops() / x[..., 0].numel()
        low = _projections(mixer)
        high = 2 * (low + seen) + _PER_STATE * state
        worst.see(_beyond(mixer.flops(context, phase), low, high), f"{spec.kind}, {phase} at {context} tokens")


def _projections(module: nn.Module) -> float:
    return linear_flops(*(layer for layer in module.modules() if isinstance(layer, nn.Linear)))


def _beyond(announced: float, low: float, high: float) -> float:
    """How far ``announced`` is outside [low, high], as a share of the bound."""
    return max(low / announced - 1, announced / high - 1, 0.0) if 0 < announced < math.inf else math.inf

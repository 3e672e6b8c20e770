"""The gate's checks that hold for every kind of layer: initial weights, declared parameters, and costs.

How each kind draws its weights, and its exact FLOPs, are facts of the kind, which its own tests assert. The
bounds here are wide: they catch a forgotten factor, or the cost of a sequence given as that of a token.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridlm.config.layers import LayerSpec
from hybridlm.eval.gate_subject import Findings, Subject, build_layers
from hybridlm.layers.layer import Phase, linear_flops
from hybridlm.layers.mixer import Mixer
from hybridlm.machine.device import CPU
from hybridlm.model import count
from hybridlm.model.block import Block
from hybridlm.model.cache import ModelCache
from hybridlm.model.columns import sequence_info

_ROWS = 8  # so that a projection of a few tokens is still a product of matrices
_PER_STATE = 64  # FLOPs per token, at most, for each number of a state


def initial_weights(subject: Subject) -> Findings:
    """The distinct layers as they are run, filled with NaN and drawn."""
    layers = [subject.plan.apply(spec) for spec in subject.places]
    model = build_layers(layers, subject.full).to_empty(device=CPU)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
        model.reset_parameters()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield 0.0 if bool(tensor.isfinite().all()) else math.inf, f"{name} is not drawn, or not finite"


def parameters(subject: Subject) -> Findings:
    """Every parameter is declared, row blocks add up to the rows, and equal layers have equally many."""
    full = subject.full
    for name, spec in full.param_specs().items():  # raises where a parameter is not declared, or one does not exist
        if spec.row_blocks:
            yield abs(sum(spec.row_blocks) - full.get_parameter(name).shape[-2]), f"rows of the blocks of {name}"
    built = build_layers(list(subject.places), full).blocks
    inside = sum(count.parameters(block) * len(at) for block, at in zip(built, subject.places.values(), strict=True))
    ends = full.embedding.weight.numel() * (1 if full.lm_head is None else 2) + full.config.d_model
    yield abs(inside + ends - count.parameters(full)), "the sum over embedding, layers, norm and head"


def state_bytes(subject: Subject) -> Findings:
    """What ``state_bytes`` announces against a cache that has been filled."""
    rows = len(subject.text)
    for tokens in sorted({1, 7, subject.plan.tokens // 2, subject.plan.tokens}):
        cache = subject.model.new_cache(rows, tokens)
        subject.logits(subject.text[:, :tokens], cache)
        announced = count.state_bytes(subject.model, tokens, rows, torch.float64)
        error = abs(announced - cache.bytes)
        yield error, f"{rows} rows of {tokens} tokens: {announced} announced, {cache.bytes} held"


def flops(subject: Subject) -> Findings:
    """Each distinct layer: training costs three forwards; a token costs a mixer its projections at least, and at most
    twice the products that torch sees and ``_PER_STATE`` for each number of its state. Errors are the excess over a
    bound, as a share of it."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # nothing is computed; attention's products are seen
        return [*_flops(subject)]


def _flops(subject: Subject) -> Findings:
    layers = list(subject.places)
    context = 2 * max((getattr(spec.params, "chunk", 0) for spec in layers), default=0) + 19
    for spec, block in zip(layers, build_layers(layers, subject.full, CPU).blocks, strict=True):
        mixer, ffn = cast(Block, block).mixer, cast(Block, block).ffn
        trained, forward = mixer.flops(context, "train"), mixer.flops(context, "prefill")
        yield _beyond(trained, 3 * forward, 3 * forward), f"{spec.kind}: training, three times the forward"
        yield from _mixer_flops(mixer, spec, context)
        if ffn is not None:  # no parameter meets a token twice
            trained, forward = ffn.flops("train"), ffn.flops("prefill")
            yield _beyond(trained, 3 * forward, 3 * forward), f"{spec.ffn_kind}: training, three times the forward"
            yield _beyond(forward, _projections(ffn), 2.0 * count.parameters(ffn)), f"{spec.ffn_kind}"


def _mixer_flops(mixer: Mixer, spec: LayerSpec, context: int) -> Findings:
    device = torch.device(CPU)
    layer = mixer.new_cache(_ROWS, context + 1, dtype=torch.float32, device=device)
    cache = ModelCache([layer], _ROWS, device)
    state = 0.0 if layer.has_columns else cache.bytes / torch.float32.itemsize / _ROWS
    cache.past = context
    phases: tuple[tuple[Phase, int, ModelCache | None], ...] = (("prefill", context, None), ("decode", 1, cache))
    for phase, tokens, past in phases:
        x = torch.empty(_ROWS, tokens, spec.params.d_model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixer(x, sequence_info(tokens, past, None, None, x[..., 0].long()), past and layer)
        low = _projections(mixer)
        high = 2 * (low + counter.get_total_flops() / (_ROWS * tokens)) + _PER_STATE * state
        yield _beyond(mixer.flops(context, phase), low, high), f"{spec.kind}, {phase} at {context} tokens"


def _projections(module: nn.Module) -> float:
    return linear_flops(*(layer for layer in module.modules() if isinstance(layer, nn.Linear)))


def _beyond(announced: float, low: float, high: float) -> float:
    """How far ``announced`` is outside [low, high], as a share of the bound."""
    return max(low / announced - 1, announced / high - 1, 0.0) if 0 < announced < math.inf else math.inf

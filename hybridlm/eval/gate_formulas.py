"""The gate's rows about what a model says it costs: parameters, bytes of state and FLOPs, of the whole model.

FLOPs are compared with the products that torch's counter sees while each distinct layer runs on tensors without memory.
The counter cannot look into hybridlm's own operators: what those do is worked out here, from the shapes they are called
with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridlm.config.layers import LayerSpec
from hybridlm.eval.gate_subject import Worst, build_layers
from hybridlm.machine.device import CPU
from hybridlm.model.block import Block
from hybridlm.model.cache import ModelCache
from hybridlm.model.columns import sequence_info
from hybridlm.model.count import flops_per_token, parameters, state_bytes
from hybridlm.model.lm import HybridLM

_SOFTMAX_KINDS = (
    "attention",
    "mla",
)  # their products of queries and keys are square, of which a causal mask leaves a part
# rows: a few tokens would be projected in batches of small matrices, which the counter could not tell from other
# products
_BATCH = 8


def counted_parameters(places: Mapping[LayerSpec, Sequence[int]], full: HybridLM) -> Worst:
    """The whole model on meta, the sum over its declarations, and its distinct layers allocated, each as often as it
    occurs.

    places: each distinct layer of ``full`` with the places where it stands.
    """
    worst = Worst()
    total, by_name = parameters(full), dict(full.named_parameters())
    specs = full.param_specs()  # raises where a parameter is not declared, or one is that does not exist
    worst.see(abs(sum(by_name[name].numel() for name in specs) - total), "the sum over the declared parameters")
    for name, spec in specs.items():
        if spec.row_blocks:
            worst.see(abs(sum(spec.row_blocks) - by_name[name].shape[-2]), f"rows of the blocks of {name}")
    allocated = build_layers(list(places), full.config, full).to_empty(device=CPU)
    outside = total - sum(parameters(block) for block in full.blocks)
    inside = sum(parameters(block) * len(at) for at, block in zip(places.values(), allocated.blocks, strict=True))
    worst.see(abs(inside + outside - total), "the sum over allocated layers")
    head = full.embedding.weight.numel() * (1 if full.lm_head is None else 2) + full.config.d_model
    worst.see(abs(outside - head), "embedding, last norm and head")
    return worst


def counted_state_bytes(places: Mapping[LayerSpec, Sequence[int]], full: HybridLM, seq_len: int) -> Worst:
    """What ``state_bytes`` announces against what a cache of the whole model allocates, also around each window."""
    worst = Worst()
    windows = {int(window) for spec in places if (window := getattr(spec.params, "window", None)) is not None}
    contexts = sorted({1, 7, seq_len, 4 * seq_len, *(max(1, window + by) for window in windows for by in (-1, 0, 1))})
    for i, context in enumerate(contexts):
        batch, dtype = (1, torch.float32) if i % 2 else (3, torch.bfloat16)
        announced, allocated = state_bytes(full, context, batch, dtype), full.new_cache(batch, context, dtype).bytes
        worst.see(
            abs(announced - allocated),
            f"{batch} rows of {context} tokens, {dtype}: {announced} announced, {allocated} allocated",
        )
    return worst


def counted_flops(places: Mapping[LayerSpec, Sequence[int]], full: HybridLM) -> Worst:
    """Each distinct layer: prefill of one token, of a text of several chunks, and decode; then the sum over the whole
    model."""
    worst, layers = Worst(), list(places)
    context = 2 * max((int(chunk) for spec in layers if (chunk := getattr(spec.params, "chunk", None))), default=16) + 3
    with (
        FakeTensorMode(),
        sdpa_kernel(SDPBackend.MATH),
    ):  # the form of attention whose products are seen; nothing is computed
        blocks = build_layers(layers, full.config, full, device=CPU).blocks
        for spec, block in zip(layers, blocks, strict=True):
            _layer_flops(spec, cast(Block, block), context, worst)
    by_layer = 2.0 * full.head_weight.numel()
    for at in places.values():
        block = cast(Block, full.blocks[at[0]])
        by_layer += len(at) * (
            block.mixer.flops(context, "prefill") + (0.0 if block.ffn is None else block.ffn.flops("prefill"))
        )
    worst.see(_difference(flops_per_token(full, context, "prefill"), by_layer), "the sum over the layers and the head")
    return worst


def _layer_flops(spec: LayerSpec, block: Block, context: int, worst: Worst) -> None:
    mixer, name = block.mixer, f"{spec.kind}:{spec.ffn_kind}"
    for tokens in (1, context):
        announced = mixer.flops(tokens, "prefill") * tokens
        worst.see(_difference(announced, _prefill(spec, block, tokens)), f"{name}, prefill of {tokens}")
        trained = mixer.flops(tokens, "train") * tokens
        worst.see(_difference(trained, 3 * announced), f"{name}: training is not three times the forward")
    worst.see(
        _difference(mixer.flops(context, "decode"), _decode(spec, block, context)), f"{name}, decode after {context}"
    )
    if block.ffn is not None:
        seen = _ffn(spec, block)
        worst.see(_difference(block.ffn.flops("prefill"), seen), f"{name}, the FFN")
        worst.see(_difference(block.ffn.flops("train"), 3 * seen), f"{name}, the FFN in training")


def _difference(announced: float, seen: float) -> float:
    return abs(announced - seen) / max(abs(seen), 1.0) if math.isfinite(announced) else math.inf


def _prefill(spec: LayerSpec, block: Block, tokens: int) -> float:
    """FLOPs of the mixer's products over one text of ``tokens``."""
    x, ids = _input(spec, tokens)
    with _Counter() as counter:
        block.mixer(x, sequence_info(tokens, None, None, None, ids))
    if spec.kind in _SOFTMAX_KINDS:
        window = getattr(spec.params, "window", None) or tokens
        visible = (
            sum(min(t + 1, window) for t in range(tokens)) / tokens**2
        )  # the share of the square that the mask leaves
        return (counter.linear + counter.batched * visible) / _BATCH
    return counter.total / _BATCH


def _decode(spec: LayerSpec, block: Block, context: int) -> float:
    """FLOPs of the mixer's products for one token after ``context`` others."""
    x, ids = _input(spec, 1)
    params: Any = spec.params
    layer = block.mixer.new_cache(_BATCH, context + 1, dtype=x.dtype, device=x.device)
    cache = ModelCache([layer], _BATCH, x.device)
    cache.past = context
    with _Counter() as counter:
        block.mixer(x, sequence_info(1, cache, None, None, ids), layer)
    if spec.kind == "mla":  # its values are padded to the width of its keys: products with zeros that nobody needs
        return counter.total / _BATCH - 2 * params.n_heads * params.qk_rope_head_dim * (context + 1)
    if spec.kind == "attention":
        return counter.total / _BATCH
    # One token's work on the state and on the convolution is done element by element, which the counter does not see:
    # each number of the state is written and read once a rank, and each of the K inputs that the convolution has in
    # front of it meets one tap.
    kept = layer.tensors()
    taps = params.d_conv * kept["conv"].shape[-1] if "conv" in kept else 0
    return (
        (counter.linear + counter.own) / _BATCH
        + 4 * getattr(params, "rank", 1) * kept["ssm"].numel() / _BATCH
        + 2 * taps
    )


def _ffn(spec: LayerSpec, block: Block) -> float:
    """FLOPs per token of the FFN's products."""
    x, _ = _input(spec, 8)
    with _Counter() as counter:
        cast(Any, block.ffn)(x)
    return counter.total / x[..., 0].numel()


def _input(spec: LayerSpec, tokens: int) -> tuple[Tensor, Tensor]:
    """(B, T, D) and (B, T)."""
    x = torch.empty(_BATCH, tokens, cast(Any, spec.params).d_model)
    return x, x[..., 0].long()


class _Counter:
    """Counts the FLOPs of a block of code. linear: products of a matrix with all tokens; batched: other products; own:
    hybridlm's operators that ``_FORMULAS`` knows."""

    def __enter__(self) -> _Counter:
        formulas = {
            getattr(torch.ops.hybridlm, name): formula
            for name, formula in _FORMULAS.items()
            if hasattr(torch.ops.hybridlm, name)
        }
        self._mode = cast(Any, FlopCounterMode)(display=False, custom_mapping=formulas)
        self._stack = ExitStack()
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(self._mode)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        counts = {str(name): count for name, count in self._mode.get_flop_counts()["Global"].items()}
        self.total = float(sum(counts.values()))
        self.linear = counts.get("aten.mm", 0) + counts.get("aten.addmm", 0)
        self.own = sum(count for name, count in counts.items() if name.startswith("hybridlm"))
        self.batched = self.total - self.linear - self.own


Shape = tuple[int, ...]


def _conv_flops(padded: Shape, weight: Shape, *rest: object, out_shape: tuple[Shape, ...]) -> int:
    return 2 * weight[-1] * math.prod(out_shape[0])


def _scan_flops(x: Shape, log_decay: Shape, scale: Shape, B: Shape, *rest: Any, out_shape: object) -> int:
    batch, length, heads, head_dim = x
    groups, d_state = B[2:]
    chunk = min(rest[-1], length)
    return batch * length * (4 * heads * head_dim * d_state + 2 * chunk * (groups * d_state + heads * head_dim))


def _mimo_flops(x: Shape, log_decay: Shape, scale: Shape, own: Shape, B: Shape, *rest: Any, out_shape: object) -> int:
    batch, length, heads, head_dim = x
    rank, _, d_state = B[2:]
    chunk = min(rest[-1], length)
    tile = 2 * chunk * rank * heads * (d_state + head_dim)
    return batch * length * rank * (4 * heads * head_dim * d_state + tile)


def _selective_flops(x: Shape, dt: Shape, A: Shape, *rest: object, out_shape: object) -> int:
    return 4 * math.prod(x) * A[-1]


def _projections_flops(x: Shape, weight: Shape, sizes: object, *, out_shape: object) -> int:
    return 2 * x[0] * math.prod(weight)


def _experts_flops(
    x: Shape, weights: Shape, order: Shape, offsets: Shape, up: Shape, down: Shape, gated: bool, *, out_shape: object
) -> int:
    return 2 * order[0] * (math.prod(up[1:]) + math.prod(down[1:]))


# The forward operators that multiply matrices or taps; in the others every number meets one other at most.
_FORMULAS: dict[str, Callable[..., int]] = {
    "causal_conv": _conv_flops,
    "scan": _scan_flops,
    "mimo_scan": _mimo_flops,
    "selective_scan": _selective_flops,
    "experts": _experts_flops,
    "projections": _projections_flops,
}

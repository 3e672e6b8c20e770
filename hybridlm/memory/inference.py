"""What the model needs to generate text, by context length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybridlm.memory.speed import Rates, decode_tokens_per_second, prefill_tokens_per_second
from hybridlm.memory.workload import Workload
from hybridlm.model.build import build_model
from hybridlm.model.count import parameters, state_bytes

CONTEXTS = (1024, 4096, 16384, 65536)
ALL_ATTENTION = "T"


@dataclass(frozen=True)
class Context:
    """One sequence with a context of ``tokens``. cache: bytes; attention: bytes of the cache if every layer were
    attention; prefill, decode: estimated tokens per second, None: the device's peaks are unknown."""

    tokens: int
    cache: int
    attention: int
    prefill: float | None
    decode: float | None


@dataclass(frozen=True)
class Inference:
    """weights: bytes, in ``dtype``."""

    dtype: str
    weights: int
    contexts: tuple[Context, ...]


def inference_of(work: Workload, rates: Rates) -> Inference:
    """In 16 bits on a GPU (bfloat16 and float16 take the same), in float32 on a CPU."""
    dtype = torch.bfloat16 if work.gpu else torch.float32
    model = build_model(work.model, work.vocab)
    layers = len(work.layers)
    other = build_model(work.model.model_copy(update={"pattern": ALL_ATTENTION, "n_layers": layers}), work.vocab)
    contexts = []
    for tokens in CONTEXTS:
        cache = state_bytes(model, tokens, 1, dtype)
        prefill = prefill_tokens_per_second(model, tokens, rates)
        decode = decode_tokens_per_second(model, tokens, cache, dtype.itemsize, rates)
        contexts.append(Context(tokens, cache, state_bytes(other, tokens, 1, dtype), prefill, decode))
    return Inference(str(dtype).removeprefix("torch."), parameters(model) * dtype.itemsize, tuple(contexts))

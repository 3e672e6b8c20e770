"""Prefill in chunks, then one token at a time, through the model's caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hybridlm.generate.sampling import Sampler
from hybridlm.model.lm import HybridLM

PREFILL_CHUNK = 512  # tokens; bounds the activations of a long prompt


@torch.inference_mode()
def generate(
    model: HybridLM, prompts: Sequence[Sequence[int]], new_tokens: int, sampler: Sampler, *, stop_id: int | None = None
) -> Iterator[list[int]]:
    """Yields up to ``new_tokens`` times the next id of every row, as they come; ends early when every row has produced ``stop_id``.

    prompts: rows of ids, all of one length of at least one token.
    """
    ids = torch.tensor(prompts, dtype=torch.long, device=model.embedding.weight.device)  # (B, T)
    cache = model.new_cache(len(prompts), ids.shape[1] + new_tokens)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for chunk in ids.split(PREFILL_CHUNK, dim=1):
        logits = model(chunk, cache=cache, keep="last").logits
    for _ in range(new_tokens):
        token = sampler(logits[:, -1])
        if stop_id is not None:
            done |= (token == stop_id).cpu()
            if bool(done.all()):
                return
        yield token.tolist()
        logits = model(token.unsqueeze(1), cache=cache, keep="last").logits

"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor


class Sampler:
    """Temperature, top-k and nucleus sampling with a generator of its own, so that a seed gives the same text whatever else runs."""

    def __init__(self, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0) -> None:
        """temperature 0: greedy; top_k: only the k likeliest; top_p: the smallest set of tokens that holds this much probability."""
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        self._generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device

    def __call__(self, logits: Tensor) -> Tensor:
        """logits: (B, V). Returns (B,) ids."""
        if self._temperature == 0:
            return logits.argmax(-1)
        probabilities = self.probabilities(logits).cpu()
        return torch.multinomial(probabilities, 1, generator=self._generator).squeeze(-1).to(logits.device)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution sampled from, (B, V) in float32."""
        logits = logits.float() / self._temperature
        if self._top_k is not None and self._top_k < logits.shape[-1]:
            smallest = logits.topk(self._top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probabilities = logits.softmax(-1)
        if self._top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self._top_p  # what comes before it already holds enough; the first one always stays
            probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

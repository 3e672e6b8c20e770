"""How the next token is sampled and where a text ends: the options, without torch; ``distribution`` applies them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybridlm.errors import UserError

_MOST = 1e9  # of a factor: float32 holds it times any logit


@dataclass(frozen=True)
class Sampling:
    """How a row is sampled, and when it ends. UserError: a value outside its range.

    Applied in this order: repetition_penalty; then temperature, top_k, top_p, min_p and a draw, or the most likely
    token if temperature is 0.

    temperature: divides the logits. top_k: keeps the k most likely tokens, and those as likely as the k-th. top_p:
    keeps the smallest set with this much probability (nucleus sampling, Holtzman et al. 2020). min_p: keeps tokens at
    least this likely relative to the most likely one (Nguyen et al. 2024). repetition_penalty: divides the positive
    logits and multiplies the negative ones of tokens in the prompt or the completion (Keskar et al. 2019). seed: the
    draw for a token depends only on the seed and on the number of tokens before it. stop: texts; the row ends before
    the first one it generates. stop_ids: ids; the row ends before the first one. max_new_tokens: the most new tokens.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    max_new_tokens: int = 200

    def __post_init__(self) -> None:
        legal = {
            "temperature": (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "0 (the most likely token) or more",
            ),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (
                1 / _MOST <= self.repetition_penalty <= _MOST,
                f"from {1 / _MOST:g} to {_MOST:g}; 1 turns it off",
            ),
            "stop": ("" not in self.stop, "not empty"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
        }
        problems = [
            f"{name} = {getattr(self, name)!r}: must be {what}" for name, (fine, what) in legal.items() if not fine
        ]
        if problems:
            raise UserError(problems)

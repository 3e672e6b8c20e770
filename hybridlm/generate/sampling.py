"""How the user wants the next token chosen, and where a text ends. Needs no torch; ``distribution`` does what it
says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hybridlm.errors import UserError

_MOST = 1e9  # of what is added to a logit, and of what multiplies one: float32 holds any of it, times any count


@dataclass(frozen=True)
class Sampling:
    """How a row goes on, and when it ends. ConfigError: a value outside its range.

    Applied in this order: logit_bias, repetition_penalty, presence_penalty and frequency_penalty; then, where
    temperature is 0, the likeliest token is taken; else temperature, top_k, top_p, min_p, and a draw.

    temperature: the logits are divided by it. top_k: only the k likeliest, and those as likely as the k-th. top_p: of
    what is left the smallest set that holds this much probability (Holtzman et al. 2020). min_p: of what is left those
    at least this likely, as a share of the likeliest one (Nguyen et al. 2024). repetition_penalty: of a token that
    stands in the prompt or in what was generated, a positive logit is divided by it and a negative one multiplied
    (Keskar et al. 2019). presence_penalty is taken off the logit of every token generated so far, frequency_penalty as
    often as it was generated. logit_bias: added to the logits, by id; -inf rules an id out. seed: of the draws; the
    draw for a token hangs on the seed and on how many tokens its row holds, and on nothing else. stop: texts; the row
    ends before the first one that it writes. stop_ids: ids; the row ends before the first one. max_new_tokens: the row
    ends behind so many. logprobs: None, or how many of the likeliest tokens are reported beside each token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    max_new_tokens: int = 200
    logprobs: int | None = None

    def __post_init__(self) -> None:
        biases = self.logit_bias.values()
        legal = {
            "temperature": (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "0 (the likeliest token) or more",
            ),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (
                1 / _MOST <= self.repetition_penalty <= _MOST,
                f"{1 / _MOST:g} to {_MOST:g}; 1 is none",
            ),
            "presence_penalty": (abs(self.presence_penalty) <= _MOST, f"{-_MOST:g} to {_MOST:g}; 0 is none"),
            "frequency_penalty": (abs(self.frequency_penalty) <= _MOST, f"{-_MOST:g} to {_MOST:g}; 0 is none"),
            "logit_bias": (
                all(abs(bias) <= _MOST or bias == -math.inf for bias in biases),
                f"{-_MOST:g} to {_MOST:g}, and -inf",
            ),
            "stop": ("" not in self.stop, "texts of one character or more"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
        }
        problems = [
            f"{name} = {getattr(self, name)!r}: legal is {what}" for name, (fine, what) in legal.items() if not fine
        ]
        if problems:
            raise UserError(problems)

    @property
    def penalises(self) -> bool:
        """Whether what a row holds changes its logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def read_biases(given: Iterable[str]) -> dict[int, float]:
    """``ID=X`` each, as on the command line. ConfigError: one that is not."""
    biases = {}
    for text in given:
        token, _, value = text.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise UserError(f"logit_bias {text!r}: expected ID=X, such as 12=-5 or 12=-inf") from None
    return biases

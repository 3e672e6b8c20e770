"""How the next token is sampled and where a text ends: the options, without torch; ``distribution`` applies them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hybridlm.errors import UserError

_MOST = 1e9  # of an added or multiplied number: float32 holds it times any count


@dataclass(frozen=True)
class Sampling:
    """How a row is sampled, and when it ends. UserError: a value outside its range.

    Applied in this order: logit_bias, repetition_penalty, presence_penalty and frequency_penalty; then temperature,
    top_k, top_p, min_p and a draw, or the most likely token if temperature is 0.

    temperature: divides the logits. top_k: keeps the k most likely tokens, and those as likely as the k-th. top_p:
    keeps the smallest set with this much probability (nucleus sampling, Holtzman et al. 2020). min_p: keeps tokens at
    least this likely relative to the most likely one (Nguyen et al. 2024). repetition_penalty: divides the positive
    logits and multiplies the negative ones of tokens in the prompt or the completion (Keskar et al. 2019).
    presence_penalty: subtracted from the logit of each token in the completion; frequency_penalty: the same, times the
    number of its occurrences. logit_bias: added to the logits by id; -inf bans an id. seed: the draw for a token
    depends only on the seed and on the number of tokens before it. stop: texts; the row ends before the first one it
    generates. stop_ids: ids; the row ends before the first one. max_new_tokens: the most new tokens. logprobs: how many
    of the most likely tokens to report with each token; None: no log-probabilities.
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
                "0 (the most likely token) or more",
            ),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (
                1 / _MOST <= self.repetition_penalty <= _MOST,
                f"from {1 / _MOST:g} to {_MOST:g}; 1 turns it off",
            ),
            "presence_penalty": (abs(self.presence_penalty) <= _MOST, f"from {-_MOST:g} to {_MOST:g}; 0 turns it off"),
            "frequency_penalty": (
                abs(self.frequency_penalty) <= _MOST,
                f"from {-_MOST:g} to {_MOST:g}; 0 turns it off",
            ),
            "logit_bias": (
                all(abs(bias) <= _MOST or bias == -math.inf for bias in biases),
                f"from {-_MOST:g} to {_MOST:g}, or -inf",
            ),
            "stop": ("" not in self.stop, "not empty"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
        }
        problems = [
            f"{name} = {getattr(self, name)!r}: must be {what}" for name, (fine, what) in legal.items() if not fine
        ]
        if problems:
            raise UserError(problems)

    @property
    def penalises(self) -> bool:
        """Whether the logits of a row depend on its tokens."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def read_biases(given: Iterable[str]) -> dict[int, float]:
    """Of ``ID=X`` arguments on the command line. UserError: one has another form."""
    biases = {}
    for text in given:
        token, _, value = text.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise UserError(f"logit_bias {text!r}: expected ID=X, for example 12=-5 or 12=-inf") from None
    return biases

"""A row being generated: its options, its text and where it ends; and the choice of the next token of several rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import RunFailed, UserError
from hybridlm.generate.distribution import TokenLogprob, adjusted, chosen, draw, settled, token_logprobs
from hybridlm.generate.sampling import Sampling
from hybridlm.generate.text_stream import TextStream

Finish = Literal["stop", "length", "context"]
Ids = Sequence[Sequence[int]]  # rows of token ids


class Step(NamedTuple):
    """One token of one row, and the text that is final now.

    id: None if the row ended without another token, at a stop id. finish: why the row ended; None: it continues.
    """

    row: int
    id: int | None
    text: str
    logprob: TokenLogprob | None
    finish: Finish | None


class Choice(NamedTuple):
    """The next token of a row. settled: rounding cannot have decided it."""

    id: int
    logprob: TokenLogprob | None
    settled: bool


class Row:
    """Sampling, text and end of one row. new: tokens it was given."""

    def __init__(self, number: int, sampling: Sampling, tokenizer: Tokenizer | None) -> None:
        self.number, self.sampling, self.new = number, sampling, 0
        self.text = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
        # Rows that differ in nothing else are sampled together.
        self.kind = replace(sampling, seed=0, stop=(), stop_ids=(), max_new_tokens=1)

    def step(self, token: int, logprob: TokenLogprob | None, full: bool) -> Step:
        """Takes the next token, which may end the row. full: the context has no room for another one after it."""
        if token in self.sampling.stop_ids:
            return Step(self.number, None, "" if self.text is None else self.text.flush(), None, "stop")
        self.new += 1
        text, stopped = ("", False) if self.text is None else self.text.feed(token)
        if stopped:
            return Step(self.number, token, text, logprob, "stop")
        finish: Finish | None = "context" if full else None
        if self.new >= self.sampling.max_new_tokens:
            finish = "length"
        if finish is not None and self.text is not None:
            text += self.text.flush()
        return Step(self.number, token, text, logprob, finish)


def refuse_impossible(samplings: Iterable[Sampling], vocab: int) -> None:
    """UserError: a logit_bias of an id that does not exist, or one that leaves no id."""
    for one in samplings:
        if wrong := [id for id in one.logit_bias if not 0 <= id < vocab]:
            raise UserError(f"logit_bias: id {wrong[0]} does not exist; ids are 0 to {vocab - 1}")
        if list(one.logit_bias.values()).count(-math.inf) == vocab:
            raise UserError("logit_bias: every id is -inf, which leaves none to choose")


def choose(logits: Tensor, rows: Sequence[Row], ids: Ids, noise: float = 0.0) -> list[Choice]:
    """The next token of every row; rows with equal options are sampled together.

    logits: (B, V). ids: all tokens of each row. noise: how much rounding may change a logit, relative to the largest
    of its row. RunFailed: logits that are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise RunFailed("the model's logits are not finite: its weights are damaged, or training diverged")
    choices: dict[int, Choice] = {}
    for place, kind in enumerate(row.kind for row in rows):
        if place in choices:
            continue
        places = [other for other in range(place, len(rows)) if rows[other].kind == kind]
        own = logits if len(places) == len(rows) else logits[places]
        theirs = [ids[other] for other in places]
        draws = [draw(rows[other].sampling.seed, len(ids[other])) for other in places]
        changed = adjusted(own, kind, theirs, [rows[other].new for other in places])
        if noise:
            tokens, sure = settled(changed, kind, draws, noise * own.abs().amax(-1))
        else:
            tokens, sure = chosen(changed, kind, draws), torch.ones(len(places), dtype=torch.bool)
        logprobs = [None] * len(places) if kind.logprobs is None else token_logprobs(own, tokens, kind.logprobs)
        choices |= zip(places, map(Choice, tokens.tolist(), logprobs, sure.tolist()), strict=True)
    return [choices[place] for place in range(len(rows))]

"""Batched generation: chunked prefill, then decoding one token of every row at a time through the model's caches.

Prompts of a batch may have any lengths. The result of a row does not depend on the others except for the rounding of
sums inside matrix products, which may differ with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hybridlm.errors import RunFailed, UserError
from hybridlm.generate.distribution import TokenLogprob, adjusted, chosen, draw, token_logprobs
from hybridlm.generate.sampling import Sampling
from hybridlm.generate.text_stream import TextStream
from hybridlm.model.decoder import Decoder

if TYPE_CHECKING:
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.cache import ModelCache
    from hybridlm.model.lm import HybridLM

Finish = Literal["stop", "length", "context"]
Ids = Sequence[Sequence[int]]  # rows of token ids
ROOM_AHEAD = 4096  # new tokens per row that memory is allocated for at once; after that the cache grows


@dataclass(frozen=True)
class Step:
    """One token of one row, and the text that is final now.

    id: None if the row ended without another token, at a stop id. finish: why the row ended; None: it continues.
    """

    row: int
    id: int | None
    text: str
    logprob: TokenLogprob | None
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """The new tokens of a row. ids: without the stop id; text: without the stop string. logprobs: one for each id, None
    if not requested."""

    ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None
    finish: Finish


@dataclass
class State:
    """Rows of tokens and the model's cache of them.

    ids: every token of each row. cache: holds all of them, except the newest if ``logits`` is None. logits: (B, V) of
    the next token. room: tokens per row that the cache has memory for.
    """

    ids: list[list[int]]
    cache: ModelCache
    logits: Tensor | None
    room: int

    def select(self, rows: Sequence[int]) -> State:
        """A new state of these rows; a row may be repeated."""
        index = torch.tensor(rows, device=self.cache.lengths.device)
        logits = None if self.logits is None else self.logits.index_select(0, index)
        return State([list(self.ids[row]) for row in rows], self.cache.select(index), logits, self.room)


class _Row:
    """Sampling, text and end of one row of ``run``."""

    def __init__(self, number: int, given: list[int], sampling: Sampling, tokenizer: Tokenizer | None) -> None:
        self.number, self.given, self.sampling = number, given, sampling
        self.text = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
        self.new: list[int] = []
        # Rows that differ in nothing else are sampled together.
        self.kind = replace(sampling, seed=0, stop=(), stop_ids=(), max_new_tokens=1)

    def step(self, token: int, logprob: TokenLogprob | None, context: int | None) -> Step:
        """Adds the next token, which may end the row."""
        if token in self.sampling.stop_ids:
            return Step(self.number, None, "" if self.text is None else self.text.flush(), None, "stop")
        self.new.append(token)
        text, stopped = ("", False) if self.text is None else self.text.feed(token)
        finish: Finish | None = None
        if stopped:
            finish = "stop"
        elif len(self.new) >= self.sampling.max_new_tokens:
            finish = "length"
        elif context is not None and len(self.given) + len(self.new) >= context:
            finish = "context"
        if finish in ("length", "context") and self.text is not None:
            text += self.text.flush()
        return Step(self.number, token, text, logprob, finish)


class Engine:
    """Generates with a model, whose weights must stay as they are for as long as it is used.

    prefill_chunk: tokens per forward of a prompt, which bounds its activations. context: the most tokens of a row;
    None: as many as fit in memory. max_batch: rows at a time; more are queued. tokenizer: None: only ids, no text.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer | None,
        *,
        prefill_chunk: int = 512,
        context: int | None = None,
        max_batch: int = 64,
    ) -> None:
        if min(prefill_chunk, max_batch) < 1 or (context is not None and context < 2):
            raise ValueError("prefill_chunk and max_batch count from 1, context from 2")
        self.model, self.tokenizer = model.eval(), tokenizer
        self._decoder = Decoder(model)
        self.prefill_chunk, self.context, self.max_batch = prefill_chunk, context, max_batch

    def generate(self, prompts: Ids, sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """The completions of all prompts, in their order; arguments and errors as for ``stream``."""
        rows: list[list[Step]] = [[] for _ in prompts]
        for step in self.stream(prompts, sampling):
            rows[step.row].append(step)
        return [completion(steps, one) for steps, one in zip(rows, _each(sampling, len(prompts)), strict=True)]

    @torch.inference_mode()
    def stream(self, prompts: Ids, sampling: Sampling | Sequence[Sampling]) -> Iterator[Step]:
        """The tokens of all rows as they are generated. sampling: one for each prompt, or one for all, in which case
        row i uses seed + i.

        Equal prompts are prefilled once. UserError: a prompt that leaves no room in the context, a logit_bias of an
        unknown id. ValueError: an empty prompt; stop strings without a tokenizer. RunFailed: logits that are not
        finite.
        """
        samplings = _each(sampling, len(prompts))
        for first in range(0, len(prompts), self.max_batch):
            some = [list(prompt) for prompt in prompts[first : first + self.max_batch]]
            theirs = samplings[first : first + self.max_batch]
            unique = list(dict.fromkeys(map(tuple, some)))
            longest = max(
                len(prompt) + min(one.max_new_tokens, ROOM_AHEAD) for prompt, one in zip(some, theirs, strict=True)
            )
            state = self.prefill(unique, longest if self.context is None else min(longest, self.context))
            if len(unique) < len(some):
                place = {prompt: row for row, prompt in enumerate(unique)}
                state = state.select([place[tuple(prompt)] for prompt in some])
            for step in self.run(state, theirs):
                yield replace(step, row=first + step.row)

    @torch.inference_mode()
    def prefill(self, prompts: Ids, room: int = 0) -> State:
        """A state with a new cache of the prompts, with memory for ``room`` tokens per row or what they need. Errors as
        for ``stream``."""
        room = max(room, *(len(prompt) + 1 for prompt in prompts))
        state = State([[] for _ in prompts], self.model.new_cache(len(prompts), room), None, room)
        self.extend(state, prompts)
        return state

    @torch.inference_mode()
    def extend(self, state: State, new: Ids) -> None:
        """Appends at least one token to every row and prefills them."""
        for row, tokens in zip(state.ids, new, strict=True):
            if not tokens:
                raise ValueError("every row needs at least one new token")
            if self.context is not None and len(row) + len(tokens) >= self.context:
                raise UserError(
                    f"prompt: {len(row) + len(tokens):,} tokens leave no room in a context of {self.context:,}"
                )
        unread = [[] if state.logits is not None else row[-1:] for row in state.ids]
        for row, tokens in zip(state.ids, new, strict=True):
            row.extend(tokens)
        self._read(state, [[*before, *tokens] for before, tokens in zip(unread, new, strict=True)])

    @torch.inference_mode()
    def decode(self, state: State, tokens: Tensor) -> Tensor:
        """One decoding step without sampling, as a benchmark times it: takes one token of every row, ``tokens`` (B,),
        for which there must be room, and returns the logits (B, V) of the next. Does not change the state's ids."""
        state.logits = self._decoder(tokens, state.cache)
        return state.logits

    @torch.inference_mode()
    def run(self, state: State, samplings: Sequence[Sampling]) -> Iterator[Step]:
        """Continues every row of ``state`` until it ends. After each step the state's ids hold what was yielded, and
        the caller may stop there. A row that has ended leaves the state, which makes the others faster; a state of one
        row can be continued afterwards, one of several is used up. Errors as for ``stream``."""
        rows = [
            _Row(i, list(ids), one, self.tokenizer)
            for i, (ids, one) in enumerate(zip(state.ids, samplings, strict=True))
        ]
        if self.tokenizer is None and any(one.stop for one in samplings):
            raise ValueError("stop strings need a tokenizer")
        vocab = self.model.vocab_size
        if wrong := [id for one in samplings for id in one.logit_bias if not 0 <= id < vocab]:
            raise UserError(f"logit_bias: id {wrong[0]} does not exist; ids are 0 to {vocab - 1}")
        if any(list(one.logit_bias.values()).count(-math.inf) == vocab for one in samplings):
            raise UserError("logit_bias: every id is -inf, which leaves none to choose")
        while rows:
            if self.context is not None and any(len(ids) >= self.context for ids in state.ids):
                raise UserError(f"the context of {self.context:,} tokens is full")
            if state.logits is None:
                self._read(state, [ids[-1:] for ids in state.ids])
            assert state.logits is not None
            steps = self._choose(state.logits, rows)
            going = []
            for place, (ids, step) in enumerate(zip(state.ids, steps, strict=True)):
                if step.id is not None:
                    ids.append(step.id)
                    state.logits = None
                if step.finish is None:
                    going.append(place)
            yield from steps
            if 0 < len(going) < len(rows):
                kept = state.select(going)
                state.ids, state.cache = kept.ids, kept.cache
            rows = [rows[place] for place in going]

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> list[Step]:
        """The next step of every row; rows with equal options are sampled together."""
        if not bool(logits.isfinite().all()):
            raise RunFailed("the model's logits are not finite: its weights are damaged, or training diverged")
        steps: dict[int, Step] = {}
        kinds = [row.kind for row in rows]
        for place, sampling in enumerate(kinds):
            if place in steps:
                continue
            places = [other for other in range(place, len(rows)) if kinds[other] == sampling]
            some = [rows[other] for other in places]
            own = logits if len(places) == len(rows) else logits[torch.tensor(places, device=logits.device)]
            changed = adjusted(own, sampling, [row.given for row in some], [row.new for row in some])
            tokens = chosen(changed, sampling, [draw(row.sampling.seed, len(row.given) + len(row.new)) for row in some])
            logprobs = (
                [None] * len(some) if sampling.logprobs is None else token_logprobs(own, tokens, sampling.logprobs)
            )
            for other, row, token, logprob in zip(places, some, tokens.tolist(), logprobs, strict=True):
                steps[other] = row.step(token, logprob, self.context)
        return [steps[place] for place in range(len(rows))]

    def _read(self, state: State, new: Ids) -> None:
        """Prefills these tokens, at least one for every row, padding shorter rows on the left, and keeps the logits of
        the next token."""
        longest, needed = max(len(row) for row in new), max(len(ids) for ids in state.ids)
        if needed > state.room:
            state.room = max(needed, state.room + state.room // 2)
            state.cache.grow(state.room)
        device = self.model.embedding.weight.device
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in new], device=device)
        valid = None
        if any(len(row) < longest for row in new):
            begins = torch.tensor([longest - len(row) for row in new], device=device)
            valid = torch.arange(longest, device=device) >= begins.unsqueeze(1)
        for start in range(0, longest, self.prefill_chunk):
            piece = slice(start, start + self.prefill_chunk)
            state.logits = self._logits(ids[:, piece], state.cache, None if valid is None else valid[:, piece])

    def _logits(self, ids: Tensor, cache: ModelCache, valid: Tensor | None = None) -> Tensor:
        """(B, V) after the last of ``ids`` (B, T)."""
        if ids.shape[1] == 1 and valid is None:
            return self._decoder(ids[:, 0], cache)
        logits: Tensor = self.model(ids, cache, valid=valid, keep="last").logits
        return logits[:, -1]


def completion(steps: Sequence[Step], sampling: Sampling) -> Completion:
    """All steps of one row as one value."""
    last = steps[-1].finish
    assert last is not None
    logprobs = [step.logprob for step in steps if step.logprob is not None]
    return Completion(
        [step.id for step in steps if step.id is not None],
        "".join(step.text for step in steps),
        None if sampling.logprobs is None else logprobs,
        last,
    )


def _each(sampling: Sampling | Sequence[Sampling], rows: int) -> list[Sampling]:
    """One for every row."""
    if isinstance(sampling, Sampling):
        return [replace(sampling, seed=sampling.seed + row) for row in range(rows)]
    if len(sampling) != rows:
        raise ValueError(f"{len(sampling)} samplings for {rows} prompts")
    return list(sampling)

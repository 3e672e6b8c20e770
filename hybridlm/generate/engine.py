"""Batched generation: chunked prefill, then decoding one token of every row at a time through the model's caches.

Prompts of a batch may have any lengths. The result of a row does not depend on the others except for the rounding of
sums inside matrix products, which may differ with the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError
from hybridlm.generate.distribution import TokenLogprob
from hybridlm.generate.row import Finish, Ids, Row, Step, choose, refuse_impossible
from hybridlm.generate.sampling import Sampling
from hybridlm.model.cache import ModelCache
from hybridlm.model.decoder import Decoder
from hybridlm.model.lm import HybridLM

ROOM_AHEAD = 4096  # new tokens per row that memory is allocated for at once; after that the cache grows


class Completion(NamedTuple):
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
            some = [tuple(prompt) for prompt in prompts[first : first + self.max_batch]]
            theirs = samplings[first : first + self.max_batch]
            unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(some))}
            room = max(
                len(prompt) + min(one.max_new_tokens, ROOM_AHEAD) for prompt, one in zip(some, theirs, strict=True)
            )
            state = self.prefill(list(unique), min(room, self.context or room))
            if len(unique) < len(some):
                state = state.select([unique[prompt] for prompt in some])
            for step in self.run(state, theirs):
                yield step._replace(row=first + step.row)

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
        if self.tokenizer is None and any(one.stop for one in samplings):
            raise ValueError("stop strings need a tokenizer")
        refuse_impossible(samplings, self.model.vocab_size)
        rows = [Row(number, one, self.tokenizer) for number, one in enumerate(samplings)]
        while rows:
            if self.context is not None and any(len(ids) >= self.context for ids in state.ids):
                raise UserError(f"the context of {self.context:,} tokens is full")
            if state.logits is None:
                self._read(state, [ids[-1:] for ids in state.ids])
            assert state.logits is not None
            steps = [
                row.step(choice.id, choice.logprob, len(ids) + 1 == self.context)
                for row, ids, choice in zip(rows, state.ids, choose(state.logits, rows, state.ids), strict=True)
            ]
            for ids, step in zip(state.ids, steps, strict=True):
                if step.id is not None:
                    ids.append(step.id)
                    state.logits = None
            yield from steps
            going = [place for place, step in enumerate(steps) if step.finish is None]
            if 0 < len(going) < len(rows):
                kept = state.select(going)
                state.ids, state.cache = kept.ids, kept.cache
            rows = [rows[place] for place in going]

    def _read(self, state: State, new: Ids) -> None:
        """Prefills these tokens, at least one for every row, padding shorter rows on the left, and keeps the logits of
        the next token."""
        longest, needed = max(len(row) for row in new), max(len(ids) for ids in state.ids)
        if needed > state.room:
            state.room = max(needed, state.room + state.room // 2)
            state.cache.grow(state.room)
        device = self.model.embedding.weight.device
        padding = [longest - len(row) for row in new]
        ids = torch.tensor([[0] * before + list(row) for before, row in zip(padding, new, strict=True)], device=device)
        if longest == 1:
            self.decode(state, ids[:, 0])
            return
        valid = torch.arange(longest, device=device) >= torch.tensor(padding, device=device).unsqueeze(1)
        for piece in (slice(start, start + self.prefill_chunk) for start in range(0, longest, self.prefill_chunk)):
            mask = valid[:, piece] if any(padding) else None
            state.logits = self.model(ids[:, piece], state.cache, valid=mask, keep="last").logits[:, -1]


def completion(steps: Sequence[Step], sampling: Sampling) -> Completion:
    """All steps of one row as one value."""
    finish = steps[-1].finish
    assert finish is not None
    ids, text = [step.id for step in steps if step.id is not None], "".join(step.text for step in steps)
    logprobs = None if sampling.logprobs is None else [step.logprob for step in steps if step.logprob is not None]
    return Completion(ids, text, logprobs, finish)


def _each(sampling: Sampling | Sequence[Sampling], rows: int) -> list[Sampling]:
    """One for every row."""
    if isinstance(sampling, Sampling):
        return [replace(sampling, seed=sampling.seed + row) for row in range(rows)]
    if len(sampling) != rows:
        raise ValueError(f"{len(sampling)} samplings for {rows} prompts")
    return list(sampling)

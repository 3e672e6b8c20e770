"""From prompts to text: prefill in chunks, then a token of every row at a time, through the model's caches.

Rows of a batch may have prompts of any lengths. What one row gets does not hang on the others but for the rounding of
the sums inside matrix products, which may differ with the number of rows.
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
from hybridlm.model.decode.decoder import Decoder

if TYPE_CHECKING:
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.cache import ModelCache
    from hybridlm.model.lm import HybridLM

Finish = Literal["stop", "length", "context"]
Ids = Sequence[Sequence[int]]  # rows of token ids
ROOM_AHEAD = 4096  # new tokens a row for which memory is taken at once; where more come the cache grows


@dataclass(frozen=True)
class Step:
    """One token of one row, and what of its text is certain now.

    id: None where the row ended without one more token: at a stop id, or with no room left. finish: why the row ended;
    None: it goes on.
    """

    row: int
    id: int | None
    text: str
    logprob: TokenLogprob | None
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """What a row wrote. ids: without a stop id; text: without a stop string. logprobs: one for each id, None where not
    asked for."""

    ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None
    finish: Finish


@dataclass
class State:
    """Rows of tokens, and what the model remembers of them.

    ids: every token of each row. cache: holds all of them but the newest where ``logits`` is None. logits: (B, V) of
    the token that comes next. room: tokens a row for which the cache has memory.
    """

    ids: list[list[int]]
    cache: ModelCache
    logits: Tensor | None
    room: int

    def select(self, rows: Sequence[int]) -> State:
        """A new state of these rows; one may come several times."""
        index = torch.tensor(rows, device=self.cache.lengths.device)
        logits = None if self.logits is None else self.logits.index_select(0, index)
        return State([list(self.ids[row]) for row in rows], self.cache.select(index), logits, self.room)


class _Row:
    """What a row of ``run`` needs beside the model."""

    def __init__(self, number: int, given: list[int], sampling: Sampling, tokenizer: Tokenizer | None) -> None:
        self.number, self.given, self.sampling = number, given, sampling
        self.text = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
        self.new: list[int] = []
        bias = tuple(sorted(sampling.logit_bias.items()))
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self.kind = (
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            *penalties,
            bias,
            sampling.logprobs,
        )

    def step(self, token: int, logprob: TokenLogprob | None, context: int | None) -> Step:
        """Takes the next token, which may end the row."""
        if token in self.sampling.stop_ids:
            return self.end("stop")
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

    def end(self, finish: Finish) -> Step:
        return Step(self.number, None, "" if self.text is None else self.text.flush(), None, finish)


class Engine:
    """A model that writes; its weights stay as they are as long as it is used.

    prefill_chunk: tokens that are read at once, which bounds the activations of a long prompt. context: the most tokens
    that a row may hold; None: as many as fit in memory. max_batch: rows at a time; more wait their turn. Without a
    tokenizer there is no text.
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
        """What every prompt goes on with, in their order; arguments as for ``stream``."""
        ids: list[list[int]] = [[] for _ in prompts]
        texts: list[list[str]] = [[] for _ in prompts]
        logprobs: list[list[TokenLogprob]] = [[] for _ in prompts]
        finishes: list[Finish] = ["length" for _ in prompts]
        for step in self.stream(prompts, sampling):
            texts[step.row].append(step.text)
            if step.id is not None:
                ids[step.row].append(step.id)
            if step.logprob is not None:
                logprobs[step.row].append(step.logprob)
            if step.finish is not None:
                finishes[step.row] = step.finish
        wanted = [one.logprobs is not None for one in _each(sampling, len(prompts))]
        return [
            Completion(tokens, "".join(text), values if asked else None, finish)
            for tokens, text, values, finish, asked in zip(ids, texts, logprobs, finishes, wanted, strict=True)
        ]

    @torch.inference_mode()
    def stream(self, prompts: Ids, sampling: Sampling | Sequence[Sampling]) -> Iterator[Step]:
        """The tokens of every row as they come. sampling: one for all rows, whose row i then draws with the seed + i,
        or one for each.

        Equal prompts are read once. ConfigError: a prompt that leaves no room in the context. ValueError: one without a
        token; stop strings without a tokenizer. RunFailed: the model gives no numbers.
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
        """Reads the prompts into a new cache with memory for ``room`` tokens a row, or what they need. Errors as for
        ``stream``."""
        room = max(room, *(len(prompt) + 1 for prompt in prompts))
        state = State([[] for _ in prompts], self.model.new_cache(len(prompts), room), None, room)
        self.extend(state, prompts)
        return state

    @torch.inference_mode()
    def extend(self, state: State, new: Ids) -> None:
        """Adds at least one token to every row, and reads them."""
        for row, tokens in zip(state.ids, new, strict=True):
            if not tokens:
                raise ValueError("a row without a new token")
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
        """Reads one token of every row, ``tokens`` (B,), for which there must be room, and returns the logits (B, V)
        behind them: what a benchmark times. The state's ids stay as they are."""
        state.logits = self._decoder(tokens, state.cache)
        return state.logits

    @torch.inference_mode()
    def run(self, state: State, samplings: Sequence[Sampling]) -> Iterator[Step]:
        """Goes on with every row of ``state`` until it ends. After each step the state's ids hold what was yielded, and
        a caller may leave off there. A row that has ended leaves the state, so that the others are faster; a state of
        one row can go on, one of several is used up. ConfigError: logit_bias of an id that is none."""
        rows = [
            _Row(i, list(ids), one, self.tokenizer)
            for i, (ids, one) in enumerate(zip(state.ids, samplings, strict=True))
        ]
        if self.tokenizer is None and any(one.stop for one in samplings):
            raise ValueError("stop strings need a tokenizer")
        vocab = self.model.vocab_size
        if wrong := [id for one in samplings for id in one.logit_bias if not 0 <= id < vocab]:
            raise UserError(f"logit_bias: id {wrong[0]}: legal is 0 to {vocab - 1}")
        if any(list(one.logit_bias.values()).count(-math.inf) == vocab for one in samplings):
            raise UserError("logit_bias: -inf rules out every id, and none is left to write")
        while rows:
            if self.context is not None and any(len(ids) >= self.context for ids in state.ids):
                raise UserError(f"no room left in a context of {self.context:,} tokens")
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
        """The next step of every row; rows that sample alike are computed together."""
        if not bool(logits.isfinite().all()):
            raise RunFailed(
                "the model gives logits that are no numbers: its weights are damaged, or its training diverged"
            )
        alike: dict[tuple[object, ...], list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(row.kind, []).append(place)
        steps: dict[int, Step] = {}
        for places in alike.values():
            some, sampling = [rows[place] for place in places], rows[places[0]].sampling
            own = logits if len(places) == len(rows) else logits[torch.tensor(places, device=logits.device)]
            changed = adjusted(own, sampling, [row.given for row in some], [row.new for row in some])
            tokens = chosen(changed, sampling, [draw(row.sampling.seed, len(row.given) + len(row.new)) for row in some])
            logprobs = (
                [None] * len(some) if sampling.logprobs is None else token_logprobs(own, tokens, sampling.logprobs)
            )
            for place, row, token, logprob in zip(places, some, tokens.tolist(), logprobs, strict=True):
                steps[place] = row.step(token, logprob, self.context)
        return [steps[place] for place in range(len(rows))]

    def _read(self, state: State, new: Ids) -> None:
        """Takes these tokens, at least one for every row, into the cache; shorter rows are padded on the left. Keeps
        the logits behind."""
        longest, needed = max(len(row) for row in new), max(len(ids) for ids in state.ids)
        if needed > state.room:
            state.room = max(needed, state.room + state.room // 2)
            state.cache.grow(state.room)
        device = self.model.embedding.weight.device
        if longest == 1:
            state.logits = self._decoder(torch.tensor([row[0] for row in new], device=device), state.cache)
            return
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in new], device=device)
        valid = None
        if any(len(row) < longest for row in new):
            begins = torch.tensor([longest - len(row) for row in new], device=device)
            valid = torch.arange(longest, device=device) >= begins.unsqueeze(1)
        for start in range(0, longest, self.prefill_chunk):
            piece = slice(start, start + self.prefill_chunk)
            output = self.model(
                ids[:, piece], state.cache, valid=None if valid is None else valid[:, piece], keep="last"
            )
        assert output.logits is not None
        state.logits = output.logits[:, -1]


def _each(sampling: Sampling | Sequence[Sampling], rows: int) -> list[Sampling]:
    """One for every row."""
    if isinstance(sampling, Sampling):
        return [replace(sampling, seed=sampling.seed + row) for row in range(rows)]
    if len(sampling) != rows:
        raise ValueError(f"{len(sampling)} samplings for {rows} prompts")
    return list(sampling)

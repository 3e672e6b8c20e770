"""One point of a benchmark, a batch at a context, measured for all contenders in turn.

On a machine that others use a time alone says little, but what two models take in the same round moves together, so
ratios are taken round by round. The first round warms up and is never reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hybridlm.bench.contenders import Contender
from hybridlm.bench.memory import forget_peak, free_bytes, peak_bytes, wait_for
from hybridlm.model.count import state_bytes


class OverBudget(Exception):
    """A turn took longer than it may; the message says how far it came."""


@dataclass(frozen=True)
class Turn:
    """seconds of the prompt up to its first token, and of each further token; peak: bytes, None where the system does
    not say."""

    first: float
    tokens: tuple[float, ...]
    peak: int | None


@dataclass
class Point:
    """One contender at one batch and context. left_out: why there are no figures, or empty."""

    name: str
    batch: int
    context: int
    parameters: int
    weight_bytes: int
    cache_bytes: int  # by the layers' own count
    cache_bytes_measured: int | None = None  # allocated
    left_out: str = ""
    turns: list[Turn] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Rates of all rows together, seconds a token by percentile; empty where nothing was measured."""
        if not self.turns:
            return {}
        tokens = sorted(seconds for turn in self.turns for seconds in turn.tokens)
        first = statistics.median(turn.first for turn in self.turns)
        figures = {
            "prefill_tokens_per_s": self.batch * self.context / first,
            "decode_tokens_per_s": self.batch / statistics.median(statistics.fmean(turn.tokens) for turn in self.turns),
            "first_token_s": first,
            **{f"token_s_p{share}": percentile(tokens, share) for share in (50, 90, 99)},
        }
        peaks = [turn.peak for turn in self.turns if turn.peak is not None]
        return figures | ({"peak_bytes": max(peaks)} if peaks else {})


def percentile(ordered: Sequence[float], share: int) -> float:
    """The smallest of rising numbers that at least ``share`` percent of them do not exceed."""
    return ordered[max(0, -(-share * len(ordered) // 100) - 1)]


def measure(
    contenders: Sequence[Contender], batch: int, context: int, *, new_tokens: int, rounds: int, budget: float
) -> list[Point]:
    """A point for each contender: prompts of ``context`` random tokens, ``new_tokens`` decoded behind each, ``rounds``
    times and once before to warm up. budget: seconds of one turn at most, and of all turns of a contender together, but
    for one that is measured."""
    points = [point_of(contender, batch, context) for contender in contenders]
    spent = dict.fromkeys(range(len(points)), 0.0)
    for number in range(rounds + 1):
        order = range(len(points)) if number % 2 else reversed(range(len(points)))
        for place in order:
            point, contender = points[place], contenders[place]
            if point.left_out or (number > 1 and spent[place] >= budget):
                continue
            began = time.perf_counter()
            try:
                turn = _turn(contender, point, new_tokens, budget)
            except OverBudget as error:
                point.left_out = str(error)
                point.turns.clear()
                continue
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                point.left_out = _no_memory(error)
                point.turns.clear()
                continue
            spent[place] += time.perf_counter() - began
            if number:
                point.turns.append(turn)
    return points


def point_of(contender: Contender, batch: int, context: int) -> Point:
    """Nothing measured yet but the bytes of the cache, where it fits: counted by the layers, and as allocated."""
    model = contender.engine.model
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
    counted = state_bytes(model, context, batch, dtype)
    point = Point(contender.name, batch, context, contender.parameters, contender.weight_bytes, counted)
    free = free_bytes(device)
    if free is not None and counted > free:
        point.left_out = f"does not fit: a cache of {counted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return point
    try:
        point.cache_bytes_measured = model.new_cache(batch, context).bytes
    except RuntimeError as error:
        point.left_out = _no_memory(error)
    return point


def _no_memory(error: RuntimeError) -> str:
    """torch.OutOfMemoryError is a RuntimeError, and on a CPU torch raises that itself; others are raised again."""
    if "memory" not in str(error):
        raise error
    return "does not fit: " + str(error).splitlines()[0][:100]


@torch.inference_mode()
def _turn(contender: Contender, point: Point, new_tokens: int, budget: float) -> Turn:
    engine, model = contender.engine, contender.engine.model
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(point.context)
    prompt = torch.randint(model.vocab_size, (point.batch, point.context), generator=generator).tolist()
    forget_peak(device)
    wait_for(device)
    began = time.perf_counter()
    state = None
    for start in range(0, point.context, engine.prefill_chunk):
        piece = [row[start : start + engine.prefill_chunk] for row in prompt]
        if state is None:
            state = engine.prefill(piece, point.context + new_tokens)
        else:
            engine.extend(state, piece)
        wait_for(device)
        done = start + len(piece[0])
        if time.perf_counter() - began > budget and done < point.context:
            raise OverBudget(f"over {budget:g} s: {done:,} of {point.context:,} tokens read")
    assert state is not None
    assert state.logits is not None
    token = state.logits.argmax(-1)
    wait_for(device)
    last = time.perf_counter()
    first, seconds = last - began, list[float]()
    for _ in range(new_tokens):
        token = engine.decode(state, token).argmax(-1)
        wait_for(device)
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        if now - began > budget and len(seconds) < new_tokens:
            raise OverBudget(f"over {budget:g} s: {len(seconds)} of {new_tokens} tokens decoded")
    return Turn(first, tuple(seconds), peak_bytes(device))


def ratio(of: Point, to: Point) -> tuple[float, float, float] | None:
    """Median, least and most of the decode rate of ``of`` over that of ``to`` in the same round; None where either has
    none."""
    pairs = list(zip(of.turns, to.turns, strict=False))
    if not pairs:
        return None
    found = [statistics.fmean(base.tokens) / statistics.fmean(turn.tokens) for turn, base in pairs]
    return statistics.median(found), min(found), max(found)

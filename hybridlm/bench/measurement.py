"""One measurement, a batch size at a context, of all models in turn.

On a shared machine absolute times say little, but the load affects all models of a round alike, so ratios are taken
within rounds. The first round is a warm-up and is never reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from hybridlm.bench.memory import free_bytes, peak_bytes, reset_peak, synchronize
from hybridlm.generate.engine import Engine
from hybridlm.model.count import parameters, state_bytes


class OverBudget(Exception):
    """A round took too long; the message says how far it got."""


@dataclass(frozen=True)
class Round:
    """prefill: seconds from the prompt to the first token; tokens: seconds of each further token; peak: bytes, None if
    unknown."""

    prefill: float
    tokens: tuple[float, ...]
    peak: int | None


@dataclass
class Measurement:
    """One model at one batch size and context. left_out: why there are no figures, or empty."""

    name: str
    batch: int
    context: int
    parameters: int
    weight_bytes: int
    cache_bytes: int  # computed by the layers
    cache_bytes_measured: int | None = None  # allocated
    left_out: str = ""
    rounds: list[Round] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Tokens per second of the whole batch, percentiles of seconds per decoding step; empty if nothing was
        measured."""
        if not self.rounds:
            return {}
        tokens = [seconds for one in self.rounds for seconds in one.tokens]
        first = statistics.median(one.prefill for one in self.rounds)
        decode = statistics.median(statistics.fmean(one.tokens) for one in self.rounds)
        figures = {
            "prefill_tokens_per_s": self.batch * self.context / first,
            "decode_tokens_per_s": self.batch / decode,
            "first_token_s": first,
            **{f"token_s_p{n}": float(np.percentile(tokens, n, method="inverted_cdf")) for n in (50, 90, 99)},
        }
        peaks = [one.peak for one in self.rounds if one.peak is not None]
        return figures | ({"peak_bytes": max(peaks)} if peaks else {})

    def decode_ratio(self, base: Measurement) -> tuple[float, float, float] | None:
        """Median, minimum and maximum of the decode rate over that of ``base`` in the same round; None if either has
        none."""
        ratios = [
            statistics.fmean(theirs.tokens) / statistics.fmean(mine.tokens)
            for mine, theirs in zip(self.rounds, base.rounds, strict=False)
        ]
        return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def measure(
    models: Mapping[str, Engine], batch: int, context: int, *, new_tokens: int, rounds: int, budget: float
) -> list[Measurement]:
    """A measurement of each model by name: prompts of ``context`` random tokens with ``new_tokens`` decoded after each,
    ``rounds`` times after a warm-up. budget: the most seconds of one round, and of all rounds of a model together, of
    which at least one is measured."""
    found = [unmeasured(name, engine, batch, context) for name, engine in models.items()]
    spent = dict.fromkeys(models, 0.0)
    for number in range(rounds + 1):
        for one in found if number % 2 else found[::-1]:
            if one.left_out or (number > 1 and spent[one.name] >= budget):
                continue
            began = time.perf_counter()
            try:
                timed = _round(models[one.name], one, new_tokens, budget)
            except (OverBudget, RuntimeError) as error:
                one.left_out = str(error) if isinstance(error, OverBudget) else _no_memory(error)
                one.rounds.clear()
                continue
            spent[one.name] += time.perf_counter() - began
            if number:
                one.rounds.append(timed)
    return found


def unmeasured(name: str, engine: Engine, batch: int, context: int) -> Measurement:
    """No times yet, only the bytes of the cache: computed by the layers and, if it fits, as allocated."""
    model = engine.model
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
    weights = sum(parameter.nbytes for parameter in model.parameters())
    counted = state_bytes(model, context, batch, dtype)
    found = Measurement(name, batch, context, parameters(model), weights, counted)
    free = free_bytes(device)
    if free is not None and counted > free:
        found.left_out = f"does not fit: a cache of {counted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
        return found
    try:
        found.cache_bytes_measured = model.new_cache(batch, context).bytes
    except RuntimeError as error:
        found.left_out = _no_memory(error)
    return found


def _no_memory(error: RuntimeError) -> str:
    """For torch.OutOfMemoryError, and the plain RuntimeError that torch raises on a CPU; others are raised again."""
    if "memory" not in str(error):
        raise error
    return "does not fit: " + str(error).splitlines()[0][:100]


@torch.inference_mode()
def _round(engine: Engine, of: Measurement, new_tokens: int, budget: float) -> Round:
    model = engine.model
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(of.context)
    prompt = torch.randint(model.vocab_size, (of.batch, of.context), generator=generator).tolist()
    reset_peak(device)
    synchronize(device)
    began = time.perf_counter()
    state = engine.prefill([row[: engine.prefill_chunk] for row in prompt], of.context + new_tokens)
    while (done := len(state.ids[0])) < of.context:
        synchronize(device)
        if time.perf_counter() - began > budget:
            raise OverBudget(f"over {budget:g} s: prefilled {done:,} of {of.context:,} tokens")
        engine.extend(state, [row[done : done + engine.prefill_chunk] for row in prompt])
    assert state.logits is not None
    token = state.logits.argmax(-1)
    synchronize(device)
    times = [time.perf_counter()]
    for number in range(new_tokens):
        if number and times[-1] - began > budget:
            raise OverBudget(f"over {budget:g} s: decoded {number} of {new_tokens} tokens")
        token = engine.decode(state, token).argmax(-1)
        synchronize(device)
        times.append(time.perf_counter())
    return Round(times[0] - began, tuple(np.diff(times).tolist()), peak_bytes(device))

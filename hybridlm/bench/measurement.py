"""One measurement, a batch size at a context, of all models in turn: trained runs, or configurations with random
weights.

On a shared machine absolute times say little, but the load affects all models of a round alike, so ratios are taken
within rounds. The first round is a warm-up and is never reported.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hybridlm.bench.command import Benchmark
from hybridlm.config.run import RunConfig
from hybridlm.generate.engine import Engine
from hybridlm.machine.device import CUDA
from hybridlm.memory.vocabulary import planned_vocabulary
from hybridlm.model.build import fresh_model
from hybridlm.model.count import parameters, state_bytes
from hybridlm.runs.checkpoint import load_run


@dataclass(frozen=True)
class Round:
    """prefill: seconds from the prompt to the first token; tokens: seconds of each further token; peak: bytes that
    torch allocated on a GPU, None elsewhere."""

    prefill: float
    tokens: tuple[float, ...]
    peak: int | None


@dataclass
class Measurement:
    """One model at one batch size and context. left_out: why there are no figures, or empty."""

    model: str
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


def trained(run: str, device: torch.device, dtype: torch.dtype, *, ema: bool) -> tuple[str, Engine]:
    """A name and the model, with the parameters that may be rounded in ``dtype``. UserError: it cannot be loaded."""
    loaded = load_run(run, device, ema=ema)
    loaded.model.round_parameters(dtype)
    return f"{loaded.folder.path.name}, step {loaded.step}", Engine(loaded.model, loaded.tokenizer)


def untrained(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Engine:
    """The model of ``config``, initialised with its seed. UserError: the vocabulary is smaller than the tokenizer's."""
    model = fresh_model(config.model, planned_vocabulary(config).ids, seed=config.seed, device=device)
    model.round_parameters(dtype)
    return Engine(model, None)


def measured(models: Mapping[str, Engine], asked: Benchmark) -> Iterator[list[Measurement]]:
    """Batch by batch, the shortest context first: a model that was too slow at one is left out at longer ones."""
    for batch in asked.batches:
        slow: dict[str, str] = {}
        for context in sorted(asked.contexts):
            found = measure(models, batch, context, asked.new_tokens, asked.rounds, asked.budget, slow)
            late = f"not tried: over the budget at {context:,} tokens"
            slow = {one.model: late for one in found if one.left_out} | slow
            yield found


def measure(
    models: Mapping[str, Engine],
    batch: int,
    context: int,
    new_tokens: int,
    rounds: int,
    budget: float,
    left_out: Mapping[str, str] | None = None,
) -> list[Measurement]:
    """A measurement of each model by name: prompts of ``context`` random tokens with ``new_tokens`` decoded after each,
    ``rounds`` times after a warm-up. budget: the most seconds of one round, and of all rounds of a model together, of
    which at least one is measured. left_out: by model, why it is not to be measured."""
    found = [unmeasured(name, engine, batch, context) for name, engine in models.items()]
    for one in found:
        one.left_out = (left_out or {}).get(one.model, one.left_out)
    spent = dict.fromkeys(models, 0.0)
    for number in range(rounds + 1):
        for one in found if number % 2 else found[::-1]:
            if one.left_out or (number > 1 and spent[one.model] >= budget):
                continue
            began = time.perf_counter()
            try:
                timed = _round(models[one.model], one, new_tokens, budget)
            except RuntimeError as error:
                timed = _no_memory(error)
            spent[one.model] += time.perf_counter() - began
            if isinstance(timed, str):
                one.left_out, one.rounds = timed, []
            elif number:
                one.rounds.append(timed)
    return found


def unmeasured(name: str, engine: Engine, batch: int, context: int) -> Measurement:
    """No times yet, only the bytes of the cache: computed by the layers and, if it fits, as allocated."""
    model, weight = engine.model, engine.model.embedding.weight
    weights = sum(parameter.nbytes for parameter in model.parameters())
    counted, free = state_bytes(model, context, batch, weight.dtype), free_bytes(weight.device)
    found = Measurement(name, batch, context, parameters(model), weights, counted)
    if free is not None and counted > free:
        found.left_out = f"does not fit: a cache of {counted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
        return found
    try:
        found.cache_bytes_measured = model.new_cache(batch, context).bytes
    except RuntimeError as error:
        found.left_out = _no_memory(error)
    return found


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None if the system does not say."""
    if device.type == CUDA:
        return torch.cuda.mem_get_info(device)[0]
    system = Path("/proc/meminfo")  # on Linux
    found = re.search(r"MemAvailable:\s+(\d+) kB", system.read_text(encoding="ascii")) if system.exists() else None
    return None if found is None else 1024 * int(found[1])


def _no_memory(error: RuntimeError) -> str:
    """For torch.OutOfMemoryError, and the plain RuntimeError that torch raises on a CPU; others are raised again."""
    if "memory" not in str(error):
        raise error
    return "does not fit: " + str(error).splitlines()[0][:100]


@torch.inference_mode()
def _round(engine: Engine, of: Measurement, new_tokens: int, budget: float) -> Round | str:
    """The times, or why it was given up."""
    model, device = engine.model, engine.model.embedding.weight.device
    on_gpu = device.type == CUDA
    generator = torch.Generator().manual_seed(of.context)
    prompt = torch.randint(model.vocab_size, (of.batch, of.context), generator=generator).tolist()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = _now(device)
    state = engine.prefill([row[: engine.prefill_chunk] for row in prompt], of.context + new_tokens)
    while (done := len(state.ids[0])) < of.context:
        if _now(device) - began > budget:
            return f"over {budget:g} s: prefilled {done:,} of {of.context:,} tokens"
        engine.extend(state, [row[done : done + engine.prefill_chunk] for row in prompt])
    assert state.logits is not None
    token = state.logits.argmax(-1)
    times = [_now(device)]
    for number in range(new_tokens):
        if number and times[-1] - began > budget:
            return f"over {budget:g} s: decoded {number} of {new_tokens} tokens"
        token = engine.decode(state, token).argmax(-1)
        times.append(_now(device))
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Round(times[0] - began, tuple(np.diff(times).tolist()), peak)


def _now(device: torch.device) -> float:
    """The time in seconds at which the device has finished."""
    if device.type == CUDA:
        torch.cuda.synchronize(device)
    return time.perf_counter()

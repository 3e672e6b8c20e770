"""Decode: throughput, latency and cache of the orders of layers, batch 1 and 16, after contexts to 8k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from gpu.models import ALL_ATTENTION, HYBRID, PATTERNS, ours
from gpu.part import Bar, Part, Row, at_least, at_most, pick, quotient
from gpu.setting import Setting
from harness.turns import take_turns

from hybridlm.model.lm import HybridLM

CONTEXTS = (512, 2048, 8192)
BATCHES = (1, 16)
TOKENS = 8  # of a round
CHUNK = 1024  # of the prefill
CASE_SECONDS = 20  # of the rounds of a case


class Decoder:
    """A model whose cache holds ``context`` tokens of random text; calling it decodes one more token of every row,
    greedily."""

    @torch.inference_mode()
    def __init__(self, setting: Setting, model: HybridLM, batch: int, context: int, room: int) -> None:
        self.setting, self.model = setting, model.eval().to(setting.dtype)
        self.cache = model.new_cache(batch, context + room)
        ids = torch.randint(setting.vocab, (batch, context), generator=torch.Generator().manual_seed(1)).to(
            setting.device
        )
        for chunk in ids.split(CHUNK, 1):
            logits = model(chunk, cache=self.cache, keep="last").logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def __call__(self) -> None:
        logits = self.model(self.token, cache=self.cache, keep="last").logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)
        self.setting.synchronize()


def _cases(setting: Setting) -> list[str]:
    return [f"batch {batch} context {context}" for batch in BATCHES for context in setting.contexts(*CONTEXTS)]


def _measure(setting: Setting, case: str) -> Iterator[Row]:
    batch, context = int(case.split()[1]), int(case.split()[3])
    room = (setting.rounds + 1) * TOKENS + 2
    decoders = {name: Decoder(setting, ours(setting, name), batch, setting.length(context), room) for name in PATTERNS}
    for decoder in decoders.values():
        decoder()
    times = take_turns(decoders, setting.affordable(decoders, CASE_SECONDS, TOKENS), TOKENS)
    for name, decoder in decoders.items():
        ms = [1e3 * seconds / TOKENS for seconds in times.seconds[name]]
        yield {
            "case": case,
            "model": name,
            "ms_per_token": 1e3 * times.median(name) / TOKENS,
            "least": min(ms),
            "most": max(ms),
            "tokens_per_s": batch * TOKENS / times.median(name),
            "cache_mb": decoder.cache.bytes / 1e6,
            "over all attention": times.ratio(ALL_ATTENTION, name).median,
        }


LONG = f"batch {BATCHES[-1]} context {CONTEXTS[-1]}"


def _cache(rows: Sequence[Row]) -> float | None:
    return quotient(
        pick(rows, "cache_mb", {"case": LONG, "model": HYBRID}),
        pick(rows, "cache_mb", {"case": LONG, "model": ALL_ATTENTION}),
    )


PART = Part(
    "decode",
    "ms and tokens/s of one decoded token, eager, the same six orders of layers at d12 in turn; batch 1 and 16 after"
    " 512, 2k and 8k tokens",
    140,
    _cases,
    _measure,
    [
        Bar(
            "decode, hybrid 3:1 against all attention, 8k context, batch 16",
            ">= 1.4x",
            at_least(1.4),
            lambda rows: pick(rows, "over all attention", {"case": LONG, "model": HYBRID}),
        ),
        Bar("cache, hybrid 3:1 against all attention, 8k context", "<= 0.3x", at_most(0.3), _cache),
    ],
)

"""Time of one decoded token, hybridlm's models beside those of Hugging Face transformers.

Batch 1, greedy, after the same prompt of 512 tokens, which fills the caches; d_model 256, 8 layers, 4096 ids, fp32. The
models decode one token at a time in turn; a ratio is that of two models' times for the same 8 tokens. transformers'
models are called directly, without what its ``generate`` adds; hybridlm's through ``Engine.decode``.

python benchmarks/decode.py [--only NAME] [--rounds N]      prints the tables and writes
benchmarks/results/decode_NAME.md
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from harness import ours, peers
from harness.report import BOUNDS, bound_row, run, table
from harness.turns import take_turns
from torch import Tensor, nn

from hybridlm.generate.engine import Engine, State
from hybridlm.model.lm import HybridLM

PROMPT, TOKENS = 512, 8  # tokens of the prompt, and of a round


class Decoder(ABC):
    """A model with its cache filled by the prompt; calling it decodes one more token."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self.model = model.eval()
        self.token = prompt  # what the model is given next

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """(1, 1, V) after these ids."""

    @torch.inference_mode()
    def __call__(self) -> None:
        self.token = self.logits(self.token)[:, -1].argmax(-1, keepdim=True)


class Ours(Decoder):
    def __init__(self, model: HybridLM, prompt: Tensor, capacity: int) -> None:
        super().__init__(model, prompt)
        self.engine, self.capacity = Engine(model, None), capacity
        self.state: State | None = None

    def logits(self, ids: Tensor) -> Tensor:
        if self.state is None:
            self.state = self.engine.prefill(ids.tolist(), self.capacity)
            assert self.state.logits is not None
            return self.state.logits.unsqueeze(1)
        return self.engine.decode(self.state, ids[:, 0]).unsqueeze(1)


class Peer(Decoder):
    def __init__(self, model: nn.Module, prompt: Tensor, cache_name: str) -> None:
        super().__init__(model, prompt)
        self.cache_name = cache_name
        self.cache: dict[str, object] = {}

    def logits(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **self.cache)
        self.cache = {self.cache_name: getattr(output, self.cache_name)}
        return output.logits


@dataclass(frozen=True)
class Pair:
    """A peer, hybridlm's model of the same shape, and how many times as long the peer should take."""

    peer_name: str
    peer: Callable[[], nn.Module]
    cache_name: str  # of transformers' argument
    our_name: str
    our: Callable[[], HybridLM]
    floor: float
    goal: float


def _one_count(pair: Pair, rounds: int, threads: int) -> tuple[list[str], Sequence[list[str]]]:
    torch.set_num_threads(threads)
    prompt = torch.randint(ours.VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    decoders = {
        pair.peer_name: Peer(pair.peer(), prompt, pair.cache_name),
        pair.our_name: Ours(pair.our(), prompt, PROMPT + (rounds + 1) * TOKENS),
    }
    for decoder in decoders.values():
        decoder()
    times = take_turns(decoders, rounds, TOKENS)
    suffix = f", {threads} thread{'s' * (threads > 1)}"
    row = bound_row(
        f"{pair.peer_name} / {pair.our_name}{suffix}",
        times.ratio(pair.peer_name, pair.our_name),
        pair.floor,
        pair.goal,
        "more",
    )
    each = [(name, times.median(name) / TOKENS) for name in decoders]
    return row, [[f"{name}{suffix}", f"{1e3 * seconds:.2f}", f"{1 / seconds:.0f}"] for name, seconds in each]


def measure(pair: Pair, rounds: int) -> list[str]:
    """With one thread, then with all that were asked for."""
    measured = [_one_count(pair, rounds, threads) for threads in sorted({1, torch.get_num_threads()})]
    return [
        f"batch 1, after {PROMPT} tokens, {rounds} rounds of {TOKENS} tokens",
        "",
        *table(BOUNDS, [row for row, _ in measured]),
        "",
        *table(("model", "median ms a token", "tokens/s"), [each for _, models in measured for each in models]),
    ]


PAIRS = {
    "mamba2": Pair("HF Mamba2", partial(peers.mamba2, 256), "cache_params", "hybridlm Mamba-2", ours.mamba2, 2.2, 4.0),
    "hybrid": Pair("HF Bamba", peers.bamba, "past_key_values", "hybridlm hybrid", ours.hybrid, 2.2, 4.0),
    "attention": Pair("HF Llama", peers.llama, "past_key_values", "hybridlm transformer", ours.transformer, 1.3, 2.0),
}


if __name__ == "__main__":
    run("decode", __doc__, {name: partial(measure, pair) for name, pair in PAIRS.items()})

"""The memory of one micro-batch part by part: embedding, each distinct layer, norm and loss, forward and backward.

A model with one of each distinct layer of the real one runs a micro-batch on fake tensors. Hooks between its layers
read from the tracker how far memory rose and where it ended. A kind that shares tables is there twice: later layers use
what the first one computes for all (a mask, rotary angles). ``timeline`` composes these parts as the real layers follow
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from hybridlm.config.layers import LayerSpec
from hybridlm.layers.layer import layer_class
from hybridlm.layers.mixer import Mixer
from hybridlm.memory.tracker import MemoryTracker, tracked
from hybridlm.memory.workload import Workload
from hybridlm.model.lm import HybridLM


class Usage(NamedTuple):
    """Bytes above what is held when the part begins."""

    peak: int
    net: int  # when it ends


class ForwardBackward(NamedTuple):
    """A part in both directions, and the bytes of its parameters' gradients, which its backward allocates if there were
    none."""

    forward: Usage
    backward: Usage
    gradients: int


@dataclass(frozen=True)
class MicrobatchMemory:
    """blocks: by layer, its first occurrence and any later one."""

    embedding: ForwardBackward
    blocks: dict[LayerSpec, tuple[ForwardBackward, ForwardBackward]]
    head: ForwardBackward
    batch: int  # the micro-batch's ids, targets and documents


class _LayerHooks:
    """Hooks between layers; each one ends the part before it."""

    def __init__(self, tracker: MemoryTracker, model: HybridLM) -> None:
        self._tracker, self._from = tracker, tracker.held
        self.forward: list[Usage] = []
        self.backward: list[Usage] = []
        self._closed: list[Usage] | None = self.forward
        self._handles = [hook for block in model.blocks for hook in self._hooks(block, first=block is model.blocks[0])]
        tracker.restart()

    def _hooks(self, block: nn.Module, first: bool) -> list[Any]:
        handles: list[Any] = [block.register_forward_hook(lambda _module, _args, output: self._border(output[0]))]
        if first:
            handles.append(block.register_forward_pre_hook(lambda _module, args: self._border(args[0])))
        return handles

    def _border(self, x: Tensor) -> None:
        if self._closed is self.forward:  # not during recomputation
            self.close()
            x.register_hook(lambda _gradient: self.close())

    def close(self) -> None:
        assert self._closed is not None
        self._closed.append(Usage(self._tracker.restart() - self._from, self._tracker.held - self._from))
        self._from = self._tracker.held

    def turn(self) -> None:
        """From forward to backward."""
        self.close()
        self._closed = self.backward

    def leave(self) -> None:
        self.close()
        for handle in self._handles:
            handle.remove()


@lru_cache(maxsize=256)
def trace_microbatch(
    work: Workload, batch: int, *, checkpointed: bool, accumulating: bool, rows: int
) -> MicrobatchMemory:
    """The memory of a micro-batch of ``batch`` sequences. checkpointed: every layer uses activation checkpointing;
    accumulating: the parameters have gradients already; rows: of logits that the loss computes at once."""
    specs = tuple(dict.fromkeys(work.layers))
    with tracked(work.gpu) as tracker:
        model = work.built(specs + tuple(spec for spec in specs if _shares(spec)))
        tracker.hold([*model.parameters(), *model.buffers()])
        model.checkpoint_blocks, model.loss_rows = int(checkpointed), rows
        if accumulating:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
        before = tracker.held
        inputs = _batch(batch, work)
        ids = tracker.held - before
        borders = _LayerHooks(tracker, model)
        loss = _loss(work, model, inputs)
        borders.turn()
        # As of ``loss.backward()``, which would suspend the mode that stands for the planned device.
        seed = (torch.ones_like(loss),)
        _engine_run_backward((loss,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)
        del loss, seed
        borders.leave()
        return _pieces(specs, borders.forward, borders.backward[::-1], model, ids)


def _batch(batch: int, work: Workload) -> tuple[Tensor, ...]:
    """Ids, targets and, with packed documents, document ids."""
    rows = batch * work.sequences
    return tuple(torch.empty(rows, work.seq_len, dtype=torch.int64) for _ in range(3 if work.documents else 2))


def _loss(work: Workload, model: HybridLM, inputs: Sequence[Tensor]) -> Tensor:
    ids, targets, *documents = inputs
    with work.autocast(model):
        pairs = work.sequences > 1
        output = model(ids, doc_ids=documents[0] if documents else None, targets=targets, each=pairs)
        total = output.loss_sum if output.aux is None else output.loss_sum + output.aux * output.n_tokens
        return cast(Tensor, total * 1.0)


def _pieces(
    specs: Sequence[LayerSpec], forward: Sequence[Usage], backward: Sequence[Usage], model: HybridLM, batch: int
) -> MicrobatchMemory:
    """ForwardBackward directions in the forward's order: embedding, layers, head."""
    blocks = [gradient_bytes(block) for block in model.blocks]
    # With tied weights the head's product allocates the gradient.
    first = 0 if model.lm_head is None else gradient_bytes(model.embedding)
    gradients = [first, *blocks, gradient_bytes(model) - sum(blocks) - first]
    both = [ForwardBackward(*piece) for piece in zip(forward, backward, gradients, strict=True)]
    later = iter(both[1 + len(specs) : -1])
    pairs = {spec: (both[1 + i], next(later) if _shares(spec) else both[1 + i]) for i, spec in enumerate(specs)}
    return MicrobatchMemory(both[0], pairs, both[-1], batch)


def _shares(spec: LayerSpec) -> bool:
    mixer: type[Mixer] = layer_class(spec.params)
    return mixer.shares_tables


def gradient_bytes(module: nn.Module) -> int:
    """Bytes of the gradients of a module's parameters, in their dtypes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())

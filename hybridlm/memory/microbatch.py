"""The bytes of a training step piece by piece: embedding, each kind of layer, norm and loss, forward and backward.

A model that has each distinct layer of the real one runs one micro-batch on fake tensors. Between hooks at the borders
of its layers the tracker says how far memory rose and where it ended. Attention is there twice: what its first layer
makes for all of its kind (a mask, rotary angles) the later ones share. ``timeline`` puts the pieces together as the
real model's layers follow each other.
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
from hybridlm.memory.tracker import MemoryTracker, tracked
from hybridlm.memory.workload import Workload
from hybridlm.model.lm import HybridLM

_SHARING = ("attention", "mla")  # kinds whose layers share what they keep in ``SequenceInfo``


class Segment(NamedTuple):
    """Bytes above those held where the piece begins."""

    peak: int
    net: int  # where it ends


class Both(NamedTuple):
    """A piece in both directions, and its parameters' gradients (those that appear in its backward where none were
    before)."""

    forward: Segment
    backward: Segment
    gradients: int


@dataclass(frozen=True)
class Pieces:
    """Of one micro-batch. blocks: by layer, its first occurrence and any later one."""

    embedding: Both
    blocks: dict[LayerSpec, tuple[Both, Both]]
    head: Both
    batch: int  # the micro-batch's ids, targets and documents


class _Borders:
    """Hooks at the borders of layers; each closes the segment before it."""

    def __init__(self, tracker: MemoryTracker, model: HybridLM) -> None:
        self._tracker, self._from = tracker, tracker.held
        self.forward: list[Segment] = []
        self.backward: list[Segment] = []
        self._closed: list[Segment] | None = self.forward
        self._handles = [hook for block in model.blocks for hook in self._hooks(block, first=block is model.blocks[0])]
        tracker.restart()

    def _hooks(self, block: nn.Module, first: bool) -> list[Any]:
        handles: list[Any] = [block.register_forward_hook(lambda _module, _args, output: self._border(output[0]))]
        if first:
            handles.append(block.register_forward_pre_hook(lambda _module, args: self._border(args[0])))
        return handles

    def _border(self, x: Tensor) -> None:
        if self._closed is self.forward:  # not when a checkpointed layer runs again
            self.close()
            x.register_hook(lambda _gradient: self.close())

    def close(self) -> None:
        assert self._closed is not None
        self._closed.append(Segment(self._tracker.restart() - self._from, self._tracker.held - self._from))
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
def follow(work: Workload, batch: int, *, checkpointed: bool, accumulating: bool, rows: int) -> Pieces:
    """The pieces of a micro-batch of ``batch`` windows. checkpointed: every layer is computed again in the backward;
    accumulating: there are gradients before; rows: of logits at once in the loss."""
    specs = tuple(dict.fromkeys(work.layers))
    with tracked(work.gpu) as tracker:
        model = work.built(specs + tuple(spec for spec in specs if spec.kind in _SHARING))
        tracker.hold([*model.parameters(), *model.buffers()])
        model.checkpoint_blocks, model.loss_rows = int(checkpointed), rows
        if accumulating:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
        before = tracker.held
        inputs = _batch(batch, work)
        ids = tracker.held - before
        borders = _Borders(tracker, model)
        loss = _loss(work, model, inputs)
        borders.turn()
        # As of ``loss.backward()``, which would suspend the mode that stands for the planned device.
        seed = (torch.ones_like(loss),)
        _engine_run_backward((loss,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)
        del loss, seed
        borders.leave()
        return _pieces(specs, borders.forward, borders.backward[::-1], model, ids)


def _batch(batch: int, work: Workload) -> tuple[Tensor, ...]:
    """Ids, targets and, where documents are told apart, theirs."""
    return tuple(torch.empty(batch, work.seq_len, dtype=torch.int64) for _ in range(3 if work.documents else 2))


def _loss(work: Workload, model: HybridLM, inputs: Sequence[Tensor]) -> Tensor:
    ids, targets, *documents = inputs
    with work.autocast(model):
        output = model(ids, doc_ids=documents[0] if documents else None, targets=targets)
        total = output.loss_sum if output.aux is None else output.loss_sum + output.aux * output.n_tokens
        return cast(Tensor, total * 1.0)


def _pieces(
    specs: Sequence[LayerSpec], forward: Sequence[Segment], backward: Sequence[Segment], model: HybridLM, batch: int
) -> Pieces:
    """Both directions in the forward's order: embedding, layers, head."""
    blocks = [gradient_bytes(block) for block in model.blocks]
    first = (
        0 if model.lm_head is None else gradient_bytes(model.embedding)
    )  # of tied weights the head's product comes first
    gradients = [first, *blocks, gradient_bytes(model) - sum(blocks) - first]
    both = [Both(*piece) for piece in zip(forward, backward, gradients, strict=True)]
    later = iter(both[1 + len(specs) : -1])
    pairs = {spec: (both[1 + i], next(later) if spec.kind in _SHARING else both[1 + i]) for i, spec in enumerate(specs)}
    return Pieces(both[0], pairs, both[-1], batch)


def gradient_bytes(module: nn.Module) -> int:
    """Of all parameters of a module; a gradient has its weight's dtype."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())

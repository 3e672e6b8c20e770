"""Finds where a bad step went wrong: the first layer whose output is not finite, or else the first parameter whose
gradient is not."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from hybridlm.data.windows.loader import Batch
    from hybridlm.model.lm import HybridLM

T = TypeVar("T")


@dataclass(frozen=True)
class Cause:
    """What was not finite ("output", "loss", "gradient", or "norm": finite gradients whose norm overflows float32), and
    the name in the model of the module or parameter that it belongs to."""

    what: str
    place: str = ""
    order: int = 0  # of several ranks' causes of one kind, the lowest is reported

    def __str__(self) -> str:
        if not self.place:
            return f"the {'gradient norm' if self.what == 'norm' else self.what}"
        layer = re.match(r"blocks\.(\d+)", self.place)
        return f"the {self.what} of " + (f"layer {layer[1]} ({self.place})" if layer else self.place)


_KINDS = ("output", "loss", "gradient", "norm")  # an earlier one explains the later ones


def find_cause(model: HybridLM, batches: Sequence[Batch], precision: AbstractContextManager[None]) -> Cause:
    """The first that went wrong on any rank in the step of these micro-batches, called while the gradients are still
    there and before the weights change. Every rank must call it: shards are gathered, and ranks exchange what they
    found.

    precision: the context in which training runs its forward.
    """
    mine = _bad_forward(model, batches, precision) or _bad_gradient(model) or Cause("norm")
    return min(everyones(mine), key=lambda cause: (_KINDS.index(cause.what), cause.order))


def fingerprint(batch: Batch) -> str:
    """The first 16 hex digits of the SHA-256 of a micro-batch's tokens, by which its windows can be found in the
    data."""
    return hashlib.sha256(batch["ids"].cpu().numpy().tobytes()).hexdigest()[:16]


def everyones(value: T) -> list[T]:
    """The ``value`` of every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _bad_forward(model: HybridLM, batches: Sequence[Batch], precision: AbstractContextManager[None]) -> Cause | None:
    """Runs the forward of every micro-batch again, even after something is found: with sharded weights the ranks must
    stay in step."""
    found: list[Cause] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(Cause("output", name))

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        # Compiled blocks would skip the hooks of the modules inside them.
        with torch.no_grad(), precision, torch.compiler.set_stance("force_eager"):
            for batch in batches:
                output = model(batch["ids"], doc_ids=batch.get("doc_ids"), targets=batch["targets"])
                if not found and not _finite((output.loss_sum, output.aux)):
                    found.append(Cause("loss"))
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward the root keeps its gathered weights, which the next step outdates
    return found[0] if found else None


def _bad_gradient(model: nn.Module) -> Cause | None:
    """In the order of the backward, from the last module to the first."""
    for order, (name, parameter) in enumerate(reversed(list(model.named_parameters()))):
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if gradient is not None and not _finite(gradient):
            return Cause("gradient", name, order)
    return None


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return all(map(_finite, value)) if isinstance(value, (tuple, list)) else True

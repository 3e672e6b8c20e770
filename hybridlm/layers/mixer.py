"""The contract of a sequence mixer. Everything outside ``layers/`` knows mixers only through it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.layers.cache import LayerCache
from hybridlm.layers.layer import Layer, Phase
from hybridlm.layers.sequence import SequenceInfo

if TYPE_CHECKING:
    from hybridlm.ops.kernels.rules import KernelUse, Need

MixerStep = Callable[[Tensor, LayerCache, SequenceInfo], Tensor]


class Mixer(Layer):
    """Moves information between the tokens of a sequence: attention, a Mamba, ...

    One ``forward`` serves training, prefill in chunks and decode: with a cache, any T >= 1 tokens may follow any
    prefix. ``shares_tables``: the first layer of the kind makes tables (a mask, rotary angles) that later ones find in
    ``SequenceInfo``; the planner then counts a first and a later layer.
    """

    shares_tables: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Tensor, seq: SequenceInfo, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, D), normalised; returns (B, T, D). A given cache is read and updated in place."""

    def prepare(self) -> MixerStep:
        """A function ``step(x (B, D), cache, seq) -> (B, D)`` that decodes one token per row, valid for as long as the
        weights stay as they are: ``forward`` without gradients, autocast and compiled kernels, all in one dtype of at
        least fp32, without padding and documents. Rows may hold different numbers of tokens (``seq.held``).

        Overridden where another form is faster: in a small model a token takes as long as calling its operators takes,
        and whatever depends on the weights alone is computed here, once.
        """

        def step(x: Tensor, cache: LayerCache, seq: SequenceInfo) -> Tensor:
            y: Tensor = self(x.unsqueeze(1), seq, cache)
            return y.squeeze(1)

        return step

    @abstractmethod
    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """An empty cache for up to ``max_len`` tokens; ``dtype`` is that of activations (states stay at least fp32)."""

    @abstractmethod
    def flops(self, context: int, phase: Phase) -> float:
        """Matrix-product FLOPs per token: of a sequence of ``context`` tokens (train: with backward; prefill), or of
        one token decoded after ``context`` others. A multiply-add counts two; of a state, one write and one read of
        each number count."""

    def state_bytes(self, context: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of the cache that ``new_cache(batch, context, dtype=dtype)`` allocates."""
        cache = self.new_cache(batch, context, dtype=dtype, device=torch.device("meta"))
        return sum(tensor.nbytes for tensor in cache.tensors().values())

    def metrics(self) -> dict[str, Tensor]:
        """Scalars that a training log reports of this layer, as ``group/name``; logged as ``group/LAYER/name``. Called
        on every rank."""
        return {}

    @classmethod
    def kernel_needs(cls, spec: Any, use: KernelUse) -> Iterable[Need]:
        """The compiled kernels that a layer of ``spec``, the kind's own, can use, each with what rules it out, if
        anything."""
        return ()


@torch.no_grad()
def step_metrics(bias: Tensor) -> dict[str, Tensor]:
    """Mean and largest of the step sizes that the bias of a state-space layer alone gives (tokens add to it). A
    layer whose steps shrink to zero has stopped reading; one whose steps grow forgets."""
    gather = getattr(bias, "full_tensor", None)  # where FSDP shards it
    step = F.softplus((bias if gather is None else gather()).float())
    return {"ssm/dt_mean": step.mean(), "ssm/dt_max": step.max()}

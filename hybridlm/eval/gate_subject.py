"""What the gate's numeric rows run on: each distinct layer of a model once, in float64, with weights that hide no
error, and its texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from hybridlm.config.layers import LayerSpec
from hybridlm.config.model import ModelConfig
from hybridlm.layers.init import Init
from hybridlm.machine.device import CPU
from hybridlm.model.block import Block
from hybridlm.model.build import build_block
from hybridlm.model.lm import HybridLM, LMOutput

VOCAB = 61  # ids of the gate's texts; the embedding pads them to 64
_MULTIPLE = 8
_WIDTH, _CHUNK, _SHORTEST = 256, 64, 24  # of the widest layer and longest chunk that are run, of the shortest text
_NO_CHUNK = 16  # what texts are cut around where no layer works in chunks


@dataclass(frozen=True)
class Plan:
    """What the layers are run on. tokens: of a text; chunk: texts are cut around multiples of it; width: d_model at
    most. Chunks and windows are shortened and layers narrowed to these, which changes nothing that is checked."""

    tokens: int
    chunk: int
    width: int
    rows: int = 2  # plain texts side by side

    def apply(self, spec: LayerSpec) -> LayerSpec:
        """``spec`` as it is run."""
        params: Any = spec.params if spec.params.d_model <= self.width else spec.params.narrowed(self.width)
        if getattr(params, "chunk", None) is not None:
            params = replace(params, chunk=min(params.chunk, self.chunk))
        if getattr(params, "window", None) is not None:
            params = replace(params, window=min(params.window, self.tokens // 2))
        return replace(spec, params=params, ffn=spec.ffn and spec.ffn.narrowed(params.d_model))


def distinct_layers(specs: Sequence[LayerSpec]) -> dict[LayerSpec, list[int]]:
    """Each different layer with its places in the model, in the order of first appearance."""
    places: dict[LayerSpec, list[int]] = {}
    for i, spec in enumerate(specs):
        places.setdefault(spec, []).append(i)
    return places


def make_plan(layers: Sequence[LayerSpec], d_model: int) -> Plan:
    """Texts of two and a half of the longest chunks."""
    chunk = min(max((getattr(spec.params, "chunk", 0) for spec in layers), default=0) or _NO_CHUNK, _CHUNK)
    return Plan(max(_SHORTEST, 2 * chunk + chunk // 2 + 5), chunk, min(d_model, _WIDTH))


def build_layers(
    layers: Sequence[LayerSpec], config: ModelConfig, like: HybridLM | None = None, device: str = "meta"
) -> HybridLM:
    """These layers with the embedding and head of ``config`` over a small vocabulary.

    like: the model whose recipe for fresh weights they take, which knows how deep it is.
    """
    width = layers[0].params.d_model
    small = config.model_copy(update={"vocab_size": None, "vocab_multiple": _MULTIPLE, "d_model": width})
    with torch.device(device):
        blocks = [build_block(spec, small) for spec in layers]
        return HybridLM(small, blocks, VOCAB, like.init if like else Init(None, "depth", len(layers)))


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected number; infinite where either is not finite."""
    if found.shape != expected.shape or not bool(found.isfinite().all()) or not bool(expected.isfinite().all()):
        return math.inf
    if not found.numel():
        return 0.0
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


class Worst:
    """The largest error seen, and where."""

    def __init__(self) -> None:
        self.error, self.where = 0.0, ""

    def see(self, error: float, where: str) -> None:
        """NaN counts as infinite."""
        error = math.inf if math.isnan(error) else error
        if error > self.error:
            self.error, self.where = error, where


class Subject:
    """A model of ``layers`` and the texts it is run on; everything follows from ``seed``."""

    def __init__(self, layers: Sequence[LayerSpec], config: ModelConfig, plan: Plan, seed: int) -> None:
        self.layers = [plan.apply(spec) for spec in layers]
        self.config, self.plan, self.seed = config, plan, seed
        self.model = _with_open_weights(build_layers(self.layers, config), seed)

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.model.blocks]

    def generator(self, offset: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000 * self.seed + offset)

    def ids(self, rows: int, tokens: int, offset: int) -> Tensor:
        """(rows, tokens) random ids, others for another ``offset``."""
        return torch.randint(VOCAB, (rows, tokens), generator=self.generator(offset))

    @cached_property
    def text(self) -> Tensor:
        """(rows, T) plain texts."""
        return self.ids(self.plan.rows, self.plan.tokens, 1)

    @cached_property
    def whole(self) -> Tensor:
        """(rows, T, V) logits of the plain texts in one forward."""
        return self.logits(self.text)

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return logits_of(self.model(ids))

    @cached_property
    def plain_targets(self) -> Tensor:
        """(1, T) targets of the first plain text."""
        return self.ids(1, self.plan.tokens, 5)

    @cached_property
    def plain_gradients(self) -> dict[str, Tensor | None]:
        """Of the first plain text's loss, the routers' included."""
        return self.gradients(self.model(self.text[:1], targets=self.plain_targets), with_aux=True)[1]

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, targets and documents, all (1, T): a document longer than a chunk, one of one token, one of two, and a
        long one."""
        tokens, chunk = self.plan.tokens, self.plan.chunk
        lengths = [min(chunk + 1, tokens - 6), 1, 2]
        lengths.append(tokens - sum(lengths))
        documents = torch.repeat_interleave(torch.tensor([3, 0, 7, 3]), torch.tensor(lengths)).unsqueeze(
            0
        )  # an id may come again
        return self.ids(1, tokens, 2), self.ids(1, tokens, 3), documents

    @cached_property
    def packed_gradients(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Loss of the packed text and the gradient of every parameter."""
        ids, targets, documents = self.packed
        return self.gradients(self.model(ids, doc_ids=documents, targets=targets), with_aux=False)

    def gradients(self, output: LMOutput, *, with_aux: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The summed loss, with the routers' losses if ``with_aux``, and its gradient by parameter; None where there is
        none."""
        loss = output.loss_sum
        assert loss is not None
        if with_aux and output.aux is not None:
            loss = loss + output.aux
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def logits_of(output: LMOutput) -> Tensor:
    assert output.logits is not None
    return output.logits


def compare_gradients(
    found: dict[str, Tensor | None], expected: dict[str, Tensor | None], worst: Worst, part: str
) -> None:
    """Each parameter's gradient against the other's, as a share of its largest number (or a millionth of the largest of
    all)."""
    sizes = {name: None if grad is None else _largest(grad) for name, grad in expected.items()}
    floor = max(1e-6 * max((size for size in sizes.values() if size is not None), default=0.0), 1e-30)
    for name, grad in expected.items():
        other, size = found[name], sizes[name]
        if grad is None or other is None or size is None:
            worst.see(0.0 if grad is other else math.inf, f"{part}: gradient of {name}")
        else:  # a number that is not finite makes the largest difference NaN or infinite
            worst.see(_largest(other - grad) / max(size, floor), f"{part}: gradient of {name}")


def _largest(tensor: Tensor) -> float:
    """The largest absolute number, in one pass; NaN where there is one."""
    return float(torch.linalg.vector_norm(tensor, torch.inf))


def _with_open_weights(model: HybridLM, seed: int) -> HybridLM:
    """Draws float64 weights in which nothing hides: no norm or D is one, no projection is zero or small, states last
    for many tokens.

    Fresh weights would hide errors: a norm's weight of one, a bias of zero, projections into the residual stream that
    are near zero.
    """
    specs = model.param_specs()
    model = model.to(torch.float64).to_empty(device=CPU)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-1.0, 1.0, generator=generator)
            parameter.copy_(drawn).mul_(3**0.5)  # of unit variance
            if specs[name].role == "embedding":
                parameter.mul_(4 * parameter.shape[1] ** -0.5)
            elif specs[name].role in ("matrix", "head") or (name.endswith(".weight") and parameter.dim() > 1):
                parameter.mul_(parameter.shape[-1] ** -0.5)
            elif name.endswith(("dt_bias", "dt_proj.bias", "A_log")):
                parameter.mul_(0.5).sub_(1.0)  # steps of about 0.3, decays of about 0.9 a token
            elif name.endswith("bias"):
                parameter.mul_(0.3)
            else:
                parameter.mul_(0.3).add_(1.0)
        for buffer in model.buffers():
            buffer.copy_(torch.empty(buffer.shape).uniform_(-0.1, 0.1, generator=generator))
    return model

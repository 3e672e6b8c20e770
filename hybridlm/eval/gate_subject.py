"""What the gate's checks run on: a model as it is, on the meta device; each of its distinct layers once, in float64,
with weights that hide no error; and texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from hybridlm.config.layers import LayerSpec
from hybridlm.config.run import RunConfig
from hybridlm.machine.device import CPU
from hybridlm.model.build import build_block, build_model
from hybridlm.model.cache import ModelCache
from hybridlm.model.lm import HybridLM, LMOutput

VOCAB = 61  # ids of the gate's texts; the embedding pads them to 64
_MULTIPLE = 8
_WIDTH, _CHUNK, _SHORTEST = 256, 64, 24  # of the widest layer and longest chunk that are run, of the shortest text
_NO_CHUNK = 16  # what texts are cut around where no layer works in chunks
_TINY = 5e-324  # instead of zero, under a fraction
Gradients = dict[str, Tensor | None]  # by parameter; None where there is none
Findings = Iterable[tuple[float, str]]  # errors, and what each is an error of


@dataclass(frozen=True)
class Plan:
    """What the layers are run on. tokens: of a text; chunk: texts are cut around multiples of it; width: d_model at
    most. Chunks and windows are shortened and layers narrowed to these, which changes nothing that is checked."""

    tokens: int
    chunk: int
    width: int

    def apply(self, spec: LayerSpec) -> LayerSpec:
        """``spec`` as it is run."""
        params: Any = spec.params if spec.params.d_model <= self.width else spec.params.narrowed(self.width)
        for name, most in (("chunk", self.chunk), ("window", self.tokens // 2)):
            if getattr(params, name, None) is not None:
                params = replace(params, **{name: min(getattr(params, name), most)})
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


def build_layers(layers: Sequence[LayerSpec], full: HybridLM, device: str = "meta") -> HybridLM:
    """These layers, with the embedding and head of ``full`` over a small vocabulary, and its recipe for fresh weights,
    which knows how deep it is."""
    width = layers[0].params.d_model
    small = full.config.model_copy(update={"vocab_size": None, "vocab_multiple": _MULTIPLE, "d_model": width})
    with torch.device(device):
        return HybridLM(small, [build_block(spec, small) for spec in layers], VOCAB, full.init)


class Subject:
    """One configuration as its checks see it; everything follows from ``seed``.

    full: the model as it is, on the meta device; places: its distinct layers and where they are.
    """

    def __init__(self, full: HybridLM, places: Mapping[LayerSpec, Sequence[int]], plan: Plan, seed: int) -> None:
        self.full, self.places, self.plan, self.seed = full, places, plan, seed

    @classmethod
    def of(cls, config: RunConfig) -> Subject:
        """``config``: as for training; only model, seed and the vocabulary are read."""
        full = build_model(config.model, config.model.vocab_size or config.data.tokenizer.vocab_size)
        places = distinct_layers(config.model.layers)
        return cls(full, places, make_plan(list(places), config.model.d_model), config.seed)

    def alone(self, layer: LayerSpec) -> Subject:
        """The same with this layer only."""
        return Subject(build_layers([layer], self.full), {layer: [0]}, self.plan, self.seed)

    @cached_property
    def model(self) -> HybridLM:
        """Each distinct layer as it is run, in float64."""
        return _with_open_weights(build_layers([self.plan.apply(spec) for spec in self.places], self.full), self.seed)

    def generator(self, offset: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000 * self.seed + offset)

    def ids(self, rows: int, tokens: int, offset: int) -> Tensor:
        """(rows, tokens) random ids, others for another ``offset``."""
        return torch.randint(VOCAB, (rows, tokens), generator=self.generator(offset))

    @cached_property
    def text(self) -> Tensor:
        """(2, T) plain texts."""
        return self.ids(2, self.plan.tokens, 1)

    @cached_property
    def whole(self) -> Tensor:
        """(2, T, V) logits of the plain texts in one forward."""
        return self.logits(self.text)

    def logits(
        self, ids: Tensor, cache: ModelCache | None = None, docs: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, self.model(ids, cache, doc_ids=docs, valid=valid).logits)

    @cached_property
    def plain(self) -> tuple[Tensor, Tensor]:
        """ids and targets, both (1, T), of the first plain text."""
        return self.text[:1], self.ids(1, self.plan.tokens, 5)

    @cached_property
    def plain_gradients(self) -> Gradients:
        """Of the first plain text's loss, the routers' included."""
        return self.gradients(*self.plain, with_aux=True)[1]

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """ids, targets and documents, all (1, T): a document longer than a chunk, one of one token, one of two, and a
        long one."""
        tokens, first = self.plan.tokens, min(self.plan.chunk + 1, self.plan.tokens - 6)
        lengths = torch.tensor([first, 1, 2, tokens - first - 3])
        documents = torch.repeat_interleave(torch.tensor([3, 0, 7, 3]), lengths).unsqueeze(0)  # an id may come again
        return self.ids(1, tokens, 2), self.ids(1, tokens, 3), documents

    def gradients(
        self, ids: Tensor, targets: Tensor, docs: Tensor | None = None, *, with_aux: bool
    ) -> tuple[Tensor, Gradients]:
        """The summed loss, with the routers' losses if ``with_aux``, and its gradients."""
        output = self.model(ids, doc_ids=docs, targets=targets)
        loss = total_loss(output) if with_aux else output.loss_sum
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def total_loss(output: LMOutput) -> Tensor:
    """The summed loss and the routers' losses."""
    loss = cast(Tensor, output.loss_sum)
    return loss if output.aux is None else loss + output.aux


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected number; infinite where either is not finite."""
    if found.shape != expected.shape:
        return math.inf
    share = largest(found - expected) / max(largest(expected), _TINY)
    return math.inf if math.isnan(share) else share


def compare_gradients(found: Gradients, expected: Gradients, part: str) -> Findings:
    """Each parameter's gradient against the other's, as a share of its largest number (or a millionth of the largest of
    all)."""
    floor = max(1e-6 * max((largest(grad) for grad in expected.values() if grad is not None), default=0.0), 1e-30)
    for name, grad in expected.items():
        other = found[name]
        error = 0.0 if grad is other else math.inf
        if grad is not None and other is not None:
            error = largest(other - grad) / max(largest(grad), floor)
        yield error, f"{part}: gradient of {name}"


def largest(tensor: Tensor) -> float:
    """The largest absolute number, in one pass, 0 where there is none; NaN where there is one."""
    return float(torch.linalg.vector_norm(tensor, torch.inf)) if tensor.numel() else 0.0


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

"""The contract of an architecture of transformers: which models of ours it represents exactly, and how.

``interop/architectures/NAME.py`` holds one each. Export and import read the same description, so that what was exported
comes back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from hybridlm.config.model import ModelConfig
from hybridlm.interop.links import Link


@dataclass(frozen=True)
class Need:
    """A constraint of an architecture that a model violates.

    field: its path, ``model.logit_softcap``; value: what it is; reason: why that cannot be represented. override: what
    lifts it, if anything does: several, in order, where one alone does not.
    """

    field: str
    value: object
    reason: str
    overrides: tuple[str, ...] = ()

    def line(self) -> str:
        remedy = f"; set {' '.join(self.overrides)}" if self.overrides else ""
        return f"{self.field} = {self.value}: {self.reason}{remedy}"


class Architecture(ABC):
    """One class of transformers, ``name``, with its ``model_type``. readers: the other programs that read its
    folder."""

    name: ClassVar[str]
    model_type: ClassVar[str]
    readers: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[frozenset[str]] = frozenset()  # fields of a config.json that it has, and does not read
    defaults: ClassVar[Mapping[str, Any]] = {}  # of fields that a config.json may leave out

    @abstractmethod
    def needs(self, model: ModelConfig) -> Iterator[Need]:
        """What stands in the way of an exact export; nothing: it can be exported."""

    @abstractmethod
    def config(self, model: ModelConfig, vocab: int) -> dict[str, Any]:
        """The part of config.json that describes the architecture, for a model that needs nothing."""

    @abstractmethod
    def links(self, model: ModelConfig) -> Iterable[Link]:
        """All tensors of such a model. The embedding, and an untied head, have as many rows as there are ids."""

    @abstractmethod
    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of ``config``: the model section, as a mapping for validation. KeyError, TypeError: a field is
        missing or of a wrong type. UserError: what it says has no counterpart here, by name."""

    def normal(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a config.json under the names and values that ``config`` writes, where there are several."""
        return fields

    def files(self, model: ModelConfig) -> dict[str, str]:
        """The text of files that such a folder has besides, by their names."""
        return {}

    def layer_ends(self, model: ModelConfig) -> list[int]:
        """After which of their layers each of ours ends, to compare the residual streams."""
        return list(range(len(model.layers)))


def plain_needs(model: ModelConfig, name: str, *, scales: bool = False) -> Iterator[Need]:
    """No soft cap; without ``scales`` no multipliers either."""
    if model.logit_softcap is not None:
        reason = f"{name} has no soft cap"
        yield Need("model.logit_softcap", model.logit_softcap, reason, ("model.logit_softcap=null",))
    if not scales:
        for field in ("embedding_scale", "residual_scale", "logit_scale"):
            if (value := getattr(model, field)) != 1.0:
                yield Need(f"model.{field}", value, f"{name} has no such multiplier", (f"model.{field}=1",))


def layers_needs(model: ModelConfig, name: str, ffns: Mapping[str, str | None]) -> Iterator[Need]:
    """Each layer is one of the kinds of ``ffns``, followed by the FFN that it names for the kind; None: by any."""
    for i, layer in enumerate(model.layers):
        if layer.kind not in ffns:
            yield Need(f"layer {i}", layer.kind, f"{name} has no such layer")
    wanted = [ffns.get(layer.kind) or layer.ffn_kind for layer in model.layers]
    for layer, ffn in zip(model.layers, wanted, strict=True):
        if layer.ffn_kind != ffn:
            reason = f"{name} has {'no FFN' if ffn == 'none' else ffn} after {layer.kind}"
            pattern = pattern_text(zip((one.letter for one in model.layers), wanted, strict=True))
            yield Need(f"the FFN after {layer.kind}", layer.ffn_kind, reason, (f"model.pattern='{pattern}'",))
            break


def spec_needs(model: ModelConfig, kind: str, legal: Mapping[str, object], name: str) -> Iterator[Need]:
    """Fields of the specs of ``kind`` must have these values."""
    for field, wanted in legal.items():
        wrong = [(path, getattr(spec, field)) for path, spec in sections(model, kind) if getattr(spec, field) != wanted]
        if wrong:
            path, value = wrong[0]
            reason = f"{name} has only {_yaml(wanted)}"
            yield Need(
                f"{path}.{field}", _yaml(value), reason, tuple(f"{path}.{field}={_yaml(wanted)}" for path, _ in wrong)
            )


def uniform_needs(model: ModelConfig, kind: str, fields: Iterable[str], name: str) -> Iterator[Need]:
    """All layers of ``kind`` have the same values of these fields."""
    different = sections(model, kind)
    for field in fields:
        values = {getattr(spec, field): path for path, spec in reversed(different)}
        if len(values) > 1:
            first = getattr(different[0][1], field)
            path, value = next(
                (path, getattr(spec, field)) for path, spec in different if getattr(spec, field) != first
            )
            reason = f"{name} has one value for all layers, and {different[0][0]}.{field} is {_yaml(first)}"
            wrong = [path for path, spec in different if getattr(spec, field) != first]
            yield Need(
                f"{path}.{field}", _yaml(value), reason, tuple(f"{path}.{field}={_yaml(first)}" for path in wrong)
            )


def sections(model: ModelConfig, kind: str) -> list[tuple[str, Any]]:
    """The paths of the sections that layers of a kind, a mixer's or an FFN's, are made of, each with its spec."""
    found: dict[str, Any] = {}
    for layer in model.layers:
        if kind == layer.kind:
            variant = layer.letter in model.variants
            found.setdefault(f"model.variants.{layer.letter}" if variant else f"model.{kind}", layer.params)
        elif kind == layer.ffn_kind:
            found.setdefault(f"model.{kind}", layer.ffn)
    return list(found.items())


def the_spec(model: ModelConfig, kind: str) -> Any:
    """The spec of the layers of a kind, which all share it; None where there are none."""
    return next((spec for _, spec in sections(model, kind)), None)


def pattern_text(layers: Iterable[tuple[str, str]]) -> str:
    """``model.pattern`` for these letters and FFNs: ``M2:mlp*3 T:mlp``."""
    runs = [(item, len(list(group))) for item, group in groupby(layers)]
    return " ".join(f"{letter}:{ffn}" + (f"*{count}" if count > 1 else "") for (letter, ffn), count in runs)


def _yaml(value: object) -> str:
    """As an override spells it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))

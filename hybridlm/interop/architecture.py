"""The contract of an architecture of transformers: which models of ours it represents exactly, and how.

``interop/architectures/NAME.py`` holds one each. Export and import read the same description, so that what was exported
comes back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Protocol

import yaml

from hybridlm.config.load import put, validate_model
from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.errors import ConfigError
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


class Candidate(Protocol):
    """An architecture of any program."""

    def needs(self, model: ModelConfig) -> Iterator[Need]: ...


def advice(architecture: Candidate, model: ModelConfig) -> list[Need]:
    """What stands in the way of an export, and what then does where the overrides are followed."""
    found: list[Need] = []
    for _ in range(4):
        needs = list(architecture.needs(model))
        found += needs
        if not needs or not all(need.overrides for need in needs):
            break
        tree: dict[str, Any] = model.model_dump()
        for path, value in (one.split("=", 1) for need in needs for one in need.overrides):
            put(tree, path.split(".")[1:], yaml.safe_load(value))
        try:
            model = validate_model(tree)
            _ = model.layers  # it may not resolve
        except ConfigError as error:
            field, _, rest = error.problems[0].partition(" = ")
            value, _, reason = rest.partition(": ")
            return [*found, Need(field, value, reason)]
    return found


def plain_needs(model: ModelConfig, name: str, *, scales: bool = False) -> Iterator[Need]:
    """No soft cap; without ``scales`` no multipliers either."""
    if model.logit_softcap is not None:
        reason = f"{name} has no soft cap"
        yield Need("model.logit_softcap", model.logit_softcap, reason, ("model.logit_softcap=null",))
    if not scales:
        for field in ("embedding_scale", "residual_scale", "logit_scale"):
            if (value := getattr(model, field)) != 1.0:
                yield Need(f"model.{field}", value, f"{name} has no such multiplier", (f"model.{field}=1",))


def layers_needs(
    model: ModelConfig, name: str, ffns: Mapping[str, Sequence[str]], *, some: str | None = None
) -> Iterator[Need]:
    """Each layer is of a kind in ``ffns``, followed by one of the FFNs that stand there; and one is of the kind
    ``some``, without which transformers cannot decode with a cache."""
    layers = [(layer.letter, layer.kind, layer.ffn_kind) for layer in model.layers]
    for i, (_, kind, _) in enumerate(layers):
        if kind not in ffns:
            yield Need(f"layer {i}", kind, f"{name} has no such layer")
    lacking = some and some not in model.kinds
    if some and lacking:
        layers.append((MIXERS[some].letter, some, layers[-1][2]))
    wanted = [(letter, ffn if ffn in ffns.get(kind, (ffn,)) else ffns[kind][0]) for letter, kind, ffn in layers]
    remedy = (f"model.pattern='{pattern_text(wanted)}'", *(("model.n_layers=null",) if lacking else ()))
    if some and lacking:
        yield Need("layers", f"no {some}", f"{name} needs {MIXERS[some].title} to decode with a cache", remedy)
    for (_, kind, ffn), (_, legal) in zip(layers, wanted, strict=True):
        if ffn != legal:
            reason = f"{name} has {' or '.join(ffns[kind]).replace('none', 'no FFN')} after {kind}"
            yield Need(f"the FFN after {kind}", ffn, reason, remedy)
            break


def spec_needs(model: ModelConfig, kind: str, legal: Mapping[str, object], name: str) -> Iterator[Need]:
    """Fields of the specs of ``kind`` must have these values."""
    for field, wanted in legal.items():
        reason, remedy = f"{name} has only {_yaml(wanted)}", (f"{field}={_yaml(wanted)}",)
        yield from fit_needs(model, kind, field, _having(field, wanted), reason, remedy)


def uniform_needs(model: ModelConfig, kind: str, fields: Iterable[str], name: str) -> Iterator[Need]:
    """All layers of ``kind`` have the same values of these fields; of those about rotation, all that rotate."""
    for field in fields:
        about_rotation = field.startswith("rope_")
        specs = [spec for _, spec in sections(model, kind) if not about_rotation or spec.rope]
        if specs:
            remedy = _settings(specs[0], field)
            reason = f"{name} has one value for all layers, and elsewhere it is {remedy[0].partition('=')[2]}"
            fits = _having(field, getattr(specs[0], field), unless="rope" if about_rotation else None)
            yield from fit_needs(model, kind, field, fits, reason, remedy)


def fit_needs(
    model: ModelConfig, kind: str, field: str, fits: Callable[[Any], bool], reason: str, remedy: Sequence[str]
) -> Iterator[Need]:
    """All specs of ``kind`` fit. field: of a spec, for the message; remedy: ``field=value`` of its section."""
    if wrong := [(path, spec) for path, spec in sections(model, kind) if not fits(spec)]:
        path, spec = wrong[0]
        overrides = tuple(f"{path}.{setting}" for path, _ in wrong for setting in remedy)
        name, _, value = _settings(spec, field)[0].partition("=")
        yield Need(f"{path}.{name}", value, reason, overrides)


def _having(field: str, value: object, unless: str | None = None) -> Callable[[Any], bool]:
    """unless: a switch without which the field has no meaning."""
    return lambda spec: getattr(spec, field) == value or (unless is not None and not getattr(spec, unless))


def _settings(spec: Any, field: str) -> tuple[str, ...]:
    """What gives a section the value that ``field`` has in ``spec``, which may be made of others."""
    if field == "rope_dim":
        return (f"rope_fraction={spec.rope_dim / spec.head_dim}",)
    if field == "d_inner":
        return (f"expand={spec.d_inner / spec.d_model}", *(("n_heads=null",) if hasattr(spec, "n_heads") else ()))
    return (f"{field}={_yaml(getattr(spec, field))}",)


def head_needs(model: ModelConfig, name: str) -> Iterator[Need]:
    """Heads of attention have d_model / n_heads channels."""
    reason = f"{name} has d_model / n_heads channels in a head"
    yield from fit_needs(
        model,
        "attention",
        "head_dim",
        lambda spec: spec.n_heads * spec.head_dim == model.d_model,
        reason,
        ("head_dim=null",),
    )


def rotary_needs(model: ModelConfig, name: str, share: float) -> Iterator[Need]:
    """This share of each head of attention is rotated, where any is."""
    reason, remedy = f"{name} rotates {share:.0%} of each head", (f"rope_fraction={share}",)
    yield from fit_needs(
        model,
        "attention",
        "rope_dim",
        lambda spec: not spec.rope or spec.rope_dim == share * spec.head_dim,
        reason,
        remedy,
    )


def scale_needs(model: ModelConfig, kind: str, width: Callable[[Any], int], name: str) -> Iterator[Need]:
    """The softmax scale of this kind of attention is that of its queries. width: channels of one."""
    reason = f"{name} has the square root of the channels of a query, inverted"
    yield from fit_needs(model, kind, "scale", lambda spec: spec.scale == width(spec) ** -0.5, reason, ("scale=null",))


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
    if isinstance(value, tuple):
        return f"[{','.join(map(_yaml, value))}]"
    return {"None": "null", "True": "true", "False": "false", "inf": ".inf"}.get(str(value), str(value))

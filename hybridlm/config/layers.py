"""What a kind of layer declares to the configuration, and the resolved description of a layer.

``config/mixers/KIND.py`` and ``config/ffns/KIND.py`` hold a kind each: a subclass of ``MixerSection`` or ``FFNSection``
(what a user writes, and how nulls are derived) and one of ``Spec`` (the result). ``layers/KIND.py`` holds the layer.
Shape letters of the whole code base: B batch, T time, D d_model, H heads, P head_dim, N d_state, G groups, V
vocabulary, K conv width, E experts, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, ClassVar, Protocol, Self, TypeVar

from hybridlm.config.problems import show
from hybridlm.config.section import Section
from hybridlm.errors import ConfigError


class Stream(Protocol):
    """What a layer needs to know about the model around it."""

    @property
    def d_model(self) -> int: ...

    @property
    def norm_eps(self) -> float: ...

    @property
    def mixers(self) -> Collection[type[MixerSection]]:
        """The sections of all kinds of mixers that it has."""


@dataclass(frozen=True)
class Spec:
    """A mixer or an FFN with every derived number filled in. The layer, the planner and ``check`` read only this.

    Two fields have a meaning to others where a kind has them: ``chunk``, a chunk length that changes speed and no
    result, and ``window``, the number of tokens that a query sees, itself included.
    """

    layer: ClassVar[str]  # the layer's class and its module in hybridlm.layers: "mamba2.Mamba2"

    d_model: int

    def narrowed(self, d_model: int) -> Self:
        """The same kind of layer, fewer heads and channels wide, for ``hybridlm check`` on a wide model. Sizes of a
        head and of its state stay."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayerSpec:
    """One layer: a mixer of ``kind`` with its parameters, then an optional FFN of ``ffn_kind``. letter: as the pattern
    spells it, for messages; layers that differ in it alone are equal."""

    kind: str
    params: Spec
    ffn_kind: str  # "none" where there is no FFN
    ffn: Spec | None
    letter: str = field(default="", compare=False)


class LayerSection(Section):
    """The section of one kind of layer (``model.KIND``)."""

    title: ClassVar[str]  # in prose: "Mamba-2"
    spec: ClassVar[type[Spec]]

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        """The fields of the spec that are neither the section's nor the model's, and those whose null means another
        number; and one line for each thing that is wrong. ``where`` is the section's path, for these lines."""
        return {}, []

    def resolve(self, model: Stream, where: str) -> Any:
        """The spec: fields as ``derived``, else the section's or the model's of the same name. Raises ConfigError."""
        numbers, problems = self.derived(model, where)
        if problems:
            raise ConfigError(problems)
        own = type(self).model_fields
        for name in (one.name for one in fields(self.spec) if one.name not in numbers):
            numbers[name] = getattr(self if name in own else model, name)
        return self.spec(**numbers)

    def widened(self, model: Stream, factor: float, multiple: int) -> Self:
        """With about ``factor`` times as many heads, or channels in ``multiple``s: what `sweep.match` may change to
        make models of equal cost. The section itself where nothing may be changed."""
        return self


class MixerSection(LayerSection):
    """The section of a mixer."""

    letter: ClassVar[str]  # in a pattern: one capital, or M and a digit
    word: ClassVar[str | None] = None  # in a pattern, in place of the letter; None: the name of the kind
    ffn: ClassVar[str] = "mlp"  # the FFN after it by default
    kernel: ClassVar[str | None] = None  # the package of its compiled kernel, which `kernels.KIND` turns on and off
    keeps_order: ClassVar[bool] = False  # models with it have no positions in attention: its state carries the order
    with_qk_norm: ClassVar[bool] = False  # models with it normalise queries and keys in attention
    forms: ClassVar[tuple[dict[str, object], ...]] = ()  # settings that make it use another kernel than the defaults do


class FFNSection(LayerSection):
    """The section of an FFN."""


S = TypeVar("S", bound=LayerSection)


def registered(package: str, base: type[S], names: Sequence[str]) -> dict[str, type[S]]:
    """The sections ``module.Class`` of a package, by module: a kind is called like its module."""
    found: dict[str, type[S]] = {}
    for module, name in (path.split(".") for path in names):
        found[module] = getattr(import_module(f"{package}.{module}"), name)
        assert issubclass(found[module], base)
    return found


def rounded(width: float, multiple: int) -> int:
    """The nearest multiple, at least one."""
    return max(1, round(width / multiple)) * multiple


def divisors(number: int, near: int) -> str:
    """The divisors of ``number`` next to ``near``, as text, as far as they are within 10,000 of it: a stranger's
    numbers may be of any size."""
    nearest = min(near, number + 1)
    below = (d for d in range(nearest - 1, max(0, nearest - 10_001), -1) if number % d == 0)
    above = (d for d in range(near + 1, min(number, near + 10_000) + 1) if number % d == 0)
    return " and ".join(str(d) for found in (below, above) if (d := next(found, None)))


def inner_channels(expand: float, d_model: int, where: str) -> tuple[int, list[str]]:
    """expand x d_model, a whole number, and what is wrong with it."""
    product = expand * d_model
    if (channels := round(product)) < 1 or not math.isclose(channels, product, rel_tol=1e-9):
        shown = f"expand x d_model = {expand:g} x {d_model} = {product:g}"
        return 1, [f"{where}.expand = {expand:g}: {shown} is not a whole number of channels"]
    return channels, []


def range_problems(section: Section, where: str, *names: str) -> list[str]:
    """What is wrong with fields that hold [low, high] of a distribution of positive numbers."""
    return [
        f"{where}.{name} = {show(pair)}: expected [low, high] with 0 < low <= high"
        for name in names
        if not 0 < (pair := getattr(section, name))[0] <= pair[1]
    ]

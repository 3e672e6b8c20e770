"""What the sections and specs of Mamba-2 and Mamba-3 share: heads of equal width, in groups that share B and C."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from pydantic import Field

from hybridlm.config.layers import MixerSection, Spec, Stream, divisors, inner_channels, range_problems, rounded
from hybridlm.config.problems import broken
from hybridlm.config.section import Pair


@dataclass(frozen=True)
class HeadsSpec(Spec):
    """``n_heads * head_dim`` is d_inner; B and C have ``n_groups`` groups of ``d_state`` channels."""

    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int
    d_conv: int
    chunk: int
    dt_range: tuple[float, float]
    norm_eps: float

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

    def narrowed(self, d_model: int) -> Self:
        groups = min(2, self.n_groups)
        per_group = min(2, self.n_heads // self.n_groups)
        return replace(self, d_model=d_model, n_heads=groups * per_group, n_groups=groups)


class HeadsSection(MixerSection):
    """The fields about heads."""

    kernel: ClassVar[str | None] = "mamba-ssm"

    d_state: int = Field(64, ge=1, description="state channels N per head")
    expand: float = Field(2, gt=0, description="d_inner / d_model")
    head_dim: int = Field(64, ge=1, description="channels P per head")
    n_heads: int | None = Field(None, ge=1, description="heads H; null: expand * d_model / head_dim")
    n_groups: int = Field(1, ge=1, description="groups G of heads that share B and C")
    d_conv: int = Field(4, ge=1, le=16, description="width K of the short causal convolution, where there is one")
    dt_range: Pair = Field((1e-3, 1e-1), description="initial step sizes, log-uniform between the two")

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        d_inner, problems = inner_channels(self.expand, model.d_model, where)
        n_heads = self.n_heads or max(1, d_inner // self.head_dim)
        product = f"{self.expand:g} x {model.d_model} = {d_inner}"
        has = f"n_heads x head_dim = {n_heads} x {self.head_dim} = {n_heads * self.head_dim}"
        problems = problems or broken(
            (
                self.n_heads is None and d_inner % self.head_dim,
                f"{where}.head_dim = {self.head_dim}: expand x d_model = {product} is not a multiple of"
                f" {self.head_dim}; nearest divisors: {divisors(d_inner, self.head_dim)}",
            ),
            (
                n_heads * self.head_dim != d_inner,
                f"{where}.n_heads = {n_heads}: {has}, but expand x d_model = {product}; null derives n_heads",
            ),
            (
                n_heads % self.n_groups,
                f"{where}.n_groups = {self.n_groups}: does not divide the {n_heads} heads; nearest divisors:"
                f" {divisors(n_heads, self.n_groups)}",
            ),
        )
        return {"n_heads": n_heads}, problems[:1] + range_problems(self, where, "dt_range")

    def widened(self, model: Stream, factor: float, multiple: int) -> Self:
        """With more or fewer heads of the same width, a multiple of the groups."""
        heads = self.n_heads or self.expand * model.d_model / self.head_dim
        heads = rounded(heads * factor, self.n_groups)
        expand = heads * self.head_dim / model.d_model
        return self.model_copy(update={"expand": expand, "n_heads": self.n_heads and heads})

"""Gated DeltaNet: section and spec, and what Kimi Delta Attention shares with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from pydantic import Field

from hybridlm.config.layers import MixerSection, Spec, Stream, divisors, range_problems
from hybridlm.config.problems import broken
from hybridlm.config.section import Pair


@dataclass(frozen=True)
class DeltaSpec(Spec):
    """``n_v_heads`` states of ``head_k_dim`` x ``head_v_dim``; keys and queries have ``n_k_heads`` heads."""

    n_k_heads: int
    n_v_heads: int
    head_k_dim: int
    head_v_dim: int
    use_conv: bool
    d_conv: int
    allow_neg_eigval: bool
    chunk: int
    dt_range: tuple[float, float]
    a_range: tuple[float, float]
    norm_eps: float

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values, in the order of the convolution's."""
        keys = self.n_k_heads * self.head_k_dim
        return keys, keys, self.n_v_heads * self.head_v_dim

    def narrowed(self, d_model: int) -> Self:
        n_k_heads, per_key = min(2, self.n_k_heads), min(2, self.n_v_heads // self.n_k_heads)
        return replace(self, d_model=d_model, n_k_heads=n_k_heads, n_v_heads=n_k_heads * per_key)


@dataclass(frozen=True)
class GDNSpec(DeltaSpec):
    """Gated DeltaNet: one decay for each head of values."""

    layer: ClassVar[str] = "gdn.GatedDeltaNet"

    use_gate: bool


class DeltaSection(MixerSection):
    """The fields that both kinds have. Heads are called as in Qwen3-Next."""

    head_k_dim: int = Field(64, ge=1, description="channels per head of keys and queries")
    head_v_dim: int | None = Field(None, ge=1, description="channels per head of values; null: head_k_dim")
    n_v_heads: int | None = Field(
        None, ge=1, description="heads of values, each with a state of its own; null: d_model / head_v_dim"
    )
    n_k_heads: int | None = Field(
        None, ge=1, description="heads of keys and queries, each read by n_v_heads / n_k_heads; null: n_v_heads"
    )
    use_conv: bool = Field(True, description="a short causal convolution over queries, keys and values")
    d_conv: int = Field(4, ge=1, le=16, description="its width K")
    allow_neg_eigval: bool = Field(
        False, description="write strengths up to 2 instead of 1: a token can then flip the sign of what is stored"
    )
    chunk: int = Field(32, ge=1, le=256, description="chunk length, a power of two; changes speed, not results")
    dt_range: Pair = Field((1e-3, 1e-1), description="initial step sizes, log-uniform between the two")
    a_range: Pair = Field((1.0, 16.0), description="initial decay rates -A, uniform between the two")

    def derived(self, model: Stream, where: str) -> tuple[dict[str, Any], list[str]]:
        width = self.head_v_dim or self.head_k_dim
        n_v_heads = self.n_v_heads or max(1, model.d_model // width)
        n_k_heads = self.n_k_heads or n_v_heads
        unequal = self.n_v_heads is None and model.d_model % width
        below = 1 << (self.chunk.bit_length() - 1)
        problems = range_problems(self, where, "dt_range", "a_range") + broken(
            (
                unequal,
                f"{where}.{'head_v_dim' if self.head_v_dim else 'head_k_dim'} = {width}: does not divide model.d_model"
                f" = {model.d_model}; nearest divisors: {divisors(model.d_model, width)}; or set {where}.n_v_heads",
            ),
            (
                n_v_heads % n_k_heads and not unequal,
                f"{where}.n_k_heads = {n_k_heads}: does not divide {where}.n_v_heads = {n_v_heads}; nearest divisors:"
                f" {divisors(n_v_heads, n_k_heads)}",
            ),
            (
                self.chunk != below,
                f"{where}.chunk = {self.chunk}: not a power of two; nearest: {below} and {2 * below}",
            ),
        )
        return {"n_k_heads": n_k_heads, "n_v_heads": n_v_heads, "head_v_dim": width}, problems

    def widened(self, model: Stream, factor: float, multiple: int) -> Self:
        """With more or fewer heads of the same width, as many of values for each of keys as before."""
        now = self.resolve(model, "")
        keys = max(1, round(now.n_k_heads * factor))
        return self.model_copy(update={"n_k_heads": keys, "n_v_heads": keys * (now.n_v_heads // now.n_k_heads)})


class GDNConfig(DeltaSection):
    """Gated DeltaNet (``model.gdn``)."""

    title: ClassVar[str] = "gated DeltaNet"
    letter: ClassVar[str] = "G"
    spec: ClassVar[type[Spec]] = GDNSpec
    with_qk_norm: ClassVar[bool] = True  # Qwen3.5

    use_gate: bool = Field(True, description="gate the normalised output by silu of a projection")

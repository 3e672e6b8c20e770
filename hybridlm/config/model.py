"""The model section: what a user writes about the architecture. Everything here is saved in every checkpoint.

The fields of the kinds of layers (``ffn_after``, ``attention``, ``mlp``, ...) are made from the registries.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, create_model

from hybridlm.config.ffns import FFN_KINDS, FFNS
from hybridlm.config.layers import LayerSpec, MixerSection
from hybridlm.config.mixers import MIXERS
from hybridlm.config.pattern import SSMS
from hybridlm.config.resolve import resolve
from hybridlm.config.section import Section, Strings, to_tuple


class InitConfig(Section):
    """Initial weights (``model.init``)."""

    std: float | None = Field(None, gt=0, description="standard deviation of projections; null: fan_in ** -0.5")
    embedding_std: float = Field(0.02, gt=0, description="standard deviation of the embedding")
    head_std: float | None = Field(
        None, gt=0, description="standard deviation of an untied head; null: like projections"
    )
    residual: Literal["depth", "zero", "none"] = Field(
        "depth",
        description="projections back into the residual stream: std / sqrt(2 n_layers), zero, or like the others",
    )


if TYPE_CHECKING:
    _SSM = str
else:
    _SSM = Literal[SSMS]
Pattern = Annotated[str | tuple[str, ...] | None, BeforeValidator(to_tuple)]


class _Shape(Section):
    name: str = Field("custom", description="name of the preset, for logs and reports")
    sizes: Strings = Field(
        ("default", "tiny", "small", "d12", "d16", "d20", "d26"), description="the values of `size` this preset takes"
    )
    d_model: int = Field(256, ge=1, description="width D of the residual stream")
    n_layers: int | None = Field(None, ge=1, le=1000, description="layers; null: as long as the pattern")
    pattern: Pattern = Field(None, description="the layers, in the grammar of docs/pattern.md; null: all attention")
    ssm: _SSM = Field("mamba2", description="what M means in the pattern")
    variants: dict[str, dict[str, object]] = Field(
        {}, description="letters of your own: {S: {mixer: attention, window: 512}}"
    )


if TYPE_CHECKING:

    class _Layers(_Shape):
        """``getattr(model, kind)`` is the section of a kind."""

        ffn_after: Section = Section()

else:
    _FFN = Literal[FFN_KINDS]
    _after = {
        kind: (_FFN, Field(mixer.ffn, description=f"the FFN after {mixer.title}")) for kind, mixer in MIXERS.items()
    }
    FFNAfter = create_model(
        "FFNAfter",
        __base__=Section,
        __doc__="Which FFN follows a mixer when the pattern does not say (``model.ffn_after``).",
        **_after,
    )
    _sections = {"ffn_after": FFNAfter} | MIXERS | FFNS
    _Layers = create_model(
        "_Layers", __base__=_Shape, **{name: (section, section()) for name, section in _sections.items()}
    )


class ModelConfig(_Layers):
    """The architecture (``model``)."""

    init: InitConfig = InitConfig()
    vocab_size: int | None = Field(None, ge=2, description="token ids the model knows; null: the tokenizer's")
    vocab_multiple: int = Field(
        64, ge=1, description="the embedding is padded to a multiple of this; padded ids are never predicted"
    )
    tie_embeddings: bool = Field(True, description="the head uses the embedding's weights")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of every RMSNorm")
    embedding_scale: float = Field(1.0, gt=0, description="multiplies the embedding's output")
    residual_scale: float = Field(
        1.0, gt=0, description="multiplies what each mixer and FFN adds to the residual stream"
    )
    logit_scale: float = Field(1.0, gt=0, description="multiplies the logits")
    logit_softcap: float | None = Field(None, gt=0, description="logits become cap * tanh(logits / cap); null: off")

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One fully resolved layer after the other, first to last. ConfigError: the pattern, a variant, or a section
        that some layer uses is wrong; ``load_config`` raises it."""
        return self._resolved[0]

    @property
    def layer_note(self) -> str | None:
        """One line where ``n_layers`` cuts the pattern's cycle or leaves a share without a layer."""
        return self._resolved[1]

    @property
    def mixers(self) -> set[type[MixerSection]]:
        """The sections of the kinds of mixers that some layer has."""
        return {MIXERS[layer.kind] for layer in self.layers}

    @property
    def kinds(self) -> set[str]:
        """The kinds of mixers and FFNs that some layer has, among them "none" where a layer has no FFN."""
        return {kind for layer in self.layers for kind in (layer.kind, layer.ffn_kind)}

    @cached_property
    def _resolved(self) -> tuple[tuple[LayerSpec, ...], str | None]:
        return resolve(self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """pydantic's, whose copies would keep the layers of the original."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("_resolved", None)
        return copied

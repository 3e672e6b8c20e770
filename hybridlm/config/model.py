"""The model section: what a user writes about the architecture. Everything here travels in every checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hybridlm.config.ffns import FFNAfter, MLPConfig, MoEConfig
from hybridlm.config.mixers import AttentionConfig, Mamba1Config, Mamba2Config, Mamba3Config, MLAConfig
from hybridlm.config.section import Section, Strings


class InitConfig(Section):
    """Initial weights (``model.init``)."""

    std: float | None = Field(None, gt=0, description="standard deviation of projections; null: fan_in ** -0.5")
    embedding_std: float = Field(0.02, gt=0, description="standard deviation of the embedding")
    head_std: float | None = Field(
        None, gt=0, description="standard deviation of an untied head; null: like projections"
    )
    residual: Literal["depth", "zero", "none"] = Field(
        "depth", description="projections back into the residual stream: std / sqrt(2 n_layers), zero, or as all others"
    )


def _pattern_items(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Pattern = Annotated[str | tuple[str, ...] | None, BeforeValidator(_pattern_items)]


class ModelConfig(Section):
    """The architecture (``model``)."""

    name: str = Field("custom", description="name of the preset, for logs and reports")
    sizes: Strings = Field(
        ("default", "tiny", "small", "d12", "d16", "d20", "d26"), description="the values of `size` this preset takes"
    )
    d_model: int = Field(256, ge=1, description="width D of the residual stream")
    n_layers: int | None = Field(None, ge=1, le=1000, description="layers; null: as long as the pattern")
    pattern: Pattern = Field(None, description="the layers, in the grammar of docs/pattern.md; null: all transformer")
    ssm: Literal["mamba1", "mamba2", "mamba3"] = Field("mamba2", description="what M means in the pattern")
    variants: dict[str, dict[str, object]] = Field(
        {}, description="letters of your own: {S: {mixer: attention, window: 512}}"
    )
    ffn_after: FFNAfter = FFNAfter()
    attention: AttentionConfig = AttentionConfig()
    mamba1: Mamba1Config = Mamba1Config()
    mamba2: Mamba2Config = Mamba2Config()
    mamba3: Mamba3Config = Mamba3Config()
    mla: MLAConfig = MLAConfig()
    mlp: MLPConfig = MLPConfig()
    moe: MoEConfig = MoEConfig()
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

"""The data section: which text, which tokenizer, which windows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Auto, Section


class TokenizerConfig(Section):
    """The tokenizer (``data.tokenizer``)."""

    kind: Literal["bpe", "bytes"] = Field("bpe", description="bpe: byte-level BPE trained on the corpus; bytes: one id per byte")
    vocab_size: int = Field(4096, ge=257, le=1_000_000, description="ids of a trained BPE, specials included")


class DataConfig(Section):
    """The corpus and how it is cut (``data``)."""

    source: Literal["stdlib", "files"] = Field("stdlib", description="stdlib: the interpreter's own library; files: text files of yours")
    path: str | None = Field(None, description="glob of UTF-8 text files for source=files, one document a file")
    out: str | None = Field(None, description="folder of prepared data; null: the user's cache folder")
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out, chosen by a hash of their path")
    seq_len: int = Field(256, ge=2, description="tokens per training window")
    val_seq_len: int | None = Field(None, ge=2, description="tokens per validation window; null: seq_len")
    global_batch: Auto = Field("auto", description="windows per optimizer step, over all devices; auto: the hardware profile's")
    batch_size: Auto = Field("auto", description="windows per device and micro-batch; auto: global_batch over devices and accumulation")

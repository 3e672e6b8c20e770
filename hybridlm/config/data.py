"""The data section: which text, which tokenizer, which windows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Auto, Section


class TokenizerConfig(Section):
    """The tokenizer (``data.tokenizer``)."""

    kind: Literal["bpe", "bytes", "file"] = Field(
        "bpe", description="bpe: byte-level BPE trained on the corpus; bytes: one id per byte; file: the one of path"
    )
    path: str | None = Field(None, description="for kind=file: a tokenizer.json, a Hugging Face folder, or a .tiktoken file")
    vocab_size: int = Field(4096, ge=257, le=1_000_000, description="ids of a trained BPE, specials included")


class DataConfig(Section):
    """The corpus and how it is cut (``data``)."""

    source: Literal["stdlib", "files", "bins"] = Field(
        "stdlib", description="stdlib: the interpreter's own library; files: files of yours; bins: a token file"
    )
    path: str | None = Field(
        None,
        description="files: a glob of .jsonl (a document a line, also .gz), .parquet (a row), else UTF-8 text (a file); bins: a file",
    )
    val_path: str | None = Field(None, description="token file held out, for source=bins; null: the last val_fraction of path")
    dtype: Literal["u16", "u32"] | None = Field(None, description="ids of a token file without header or sidecar, for source=bins")
    text_field: str = Field("text", min_length=1, description="field of .jsonl, column of .parquet that holds the text")
    on_bad: Literal["skip", "fail"] = Field("skip", description="what cannot be read: leave it out and say so, or refuse the corpus")
    out: str | None = Field(None, description="folder of prepared data; null: the user's cache folder")
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out, chosen by a hash of their path")
    seq_len: int = Field(256, ge=2, description="tokens per training window")
    packing: bool = Field(False, description="training windows of whole documents, packed best-fit; false: cut anywhere in the text")
    isolate: bool = Field(True, description="with packing: no document sees another in its window, in any layer")
    val_seq_len: int | None = Field(None, ge=2, description="tokens per validation window; null: seq_len")
    global_batch: Auto = Field("auto", description="windows per optimizer step, over all devices; auto: the hardware profile's")
    batch_size: Auto = Field("auto", description="windows per device and micro-batch; auto: global_batch over devices and accumulation")

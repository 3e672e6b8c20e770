"""The data section: which text, which tokenizer, which windows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hybridlm.config.section import Auto, Paths, Section, Strings
from hybridlm.config.synthetic import SyntheticConfig


class TokenizerConfig(Section):
    """The tokenizer (``data.tokenizer``)."""

    kind: Literal["bpe", "bytes", "file"] = Field(
        "bpe",
        description="bpe: byte-level BPE trained on the corpus; bytes: one id per byte; file: the tokenizer at path",
    )
    path: str | None = Field(None, description="for kind=file: a tokenizer.json, or a Hugging Face folder with one")
    vocab_size: int = Field(4096, ge=257, le=1_000_000, description="ids of a trained BPE, specials included")
    split: Literal["hybridlm", "llama3"] = Field(
        "hybridlm",
        description="pieces of text that a trained BPE does not merge across; llama3: Llama 3's, which llama.cpp knows",
    )
    special_tokens: Strings = Field((), description="special tokens besides <|endoftext|>, added if missing")
    train_mb: int = Field(
        128, ge=1, description="MB of text that a BPE is trained on at most, taken evenly from the whole corpus"
    )


class HfConfig(Section):
    """A data set of the Hugging Face hub, or a folder that ``datasets`` reads (``data.hf``)."""

    id: str | None = Field(None, min_length=1, description="owner/name on the hub, or a local folder")
    name: str | None = Field(None, description="configuration of the data set; null: its only or default one")
    split: str = Field(
        "train", min_length=1, description="split of the data set; validation documents are held out from it"
    )
    revision: str | None = Field(None, description="branch, tag or commit; null: the newest")
    streaming: bool = Field(
        False, description="read over the network without a copy on disk; training reads token files in any case"
    )
    limit_mb: int | None = Field(None, ge=1, description="maximum MB of text, sampled evenly; null: everything")


class CorpusConfig(Section):
    """Where documents come from."""

    source: Literal["stdlib", "files", "hf"] = Field(
        "stdlib", description="stdlib: the interpreter's own library; files: yours; hf: a data set of the hub"
    )
    path: Paths | None = Field(
        None,
        description=(
            "a file, a folder, a glob, or a list of these; files: one document per line of .jsonl or .jsonl.gz, per row"
            " of .parquet, and per file of any other UTF-8 text; bins: token files"
        ),
    )
    val_path: Paths | None = Field(
        None,
        description=(
            "for source=files and bins: the validation text, in the same form as path; null: val_fraction of path"
        ),
    )
    format: Literal["text", "chat", "preferences"] = Field(
        "text",
        description=(
            "chat: records are conversations (formats in docs/data.md); the loss is on the assistant's tokens only;"
            " preferences: conversations with a chosen and a rejected end, for optim=dpo"
        ),
    )
    text_field: str = Field("text", min_length=1, description="field of .jsonl or column of .parquet with the text")
    on_bad: Literal["skip", "fail"] = Field(
        "skip", description="unreadable records; skip: leave them out with a message; fail: refuse the corpus"
    )
    dedup: bool = Field(False, description="drop exact duplicates of documents")
    hf: HfConfig = HfConfig()


class PartConfig(CorpusConfig):
    """One corpus of a mixture (``data.parts.NAME``)."""

    weight: float = Field(1.0, gt=0, description="share of windows, relative to the sum of all weights")


class DataConfig(CorpusConfig):
    """The corpus, the tokenizer and the training windows (``data``)."""

    source: Literal["stdlib", "files", "hf", "bins", "mixture", "synthetic"] = Field(  # type: ignore[assignment]
        "stdlib",
        description=(
            "stdlib: the interpreter's own library; files: yours; hf: a data set of the hub; bins: token files;"
            " mixture: parts; synthetic: a generated task"
        ),
    )
    synthetic: SyntheticConfig = SyntheticConfig()
    parts: dict[str, PartConfig] = Field(
        {}, description="for source=mixture: {web: {source: files, path: ..., weight: 3}, code: {...}}"
    )
    dtype: Literal["u16", "u32"] | None = Field(
        None, description="for source=bins: the type of the ids in token files without a header or sidecar"
    )
    out: str | None = Field(None, description="folder of prepared data; null: the user's cache folder")
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of documents held out, chosen by a hash of their text; of a single text: its end",
    )
    shard_mb: int = Field(64, ge=1, description="approximate maximum MB of text per token file")
    prepare_workers: Auto = Field("auto", description="processes that tokenise; auto: one per core")
    seq_len: int = Field(256, ge=2, description="tokens per training window; of a synthetic task, per example")
    packing: bool = Field(
        False, description="windows of whole documents, packed best-fit; false: cut anywhere in the text"
    )
    isolate: bool = Field(True, description="with packing: documents in a window do not see each other, in any layer")
    val_seq_len: int | None = Field(None, ge=2, description="tokens per validation window; null: seq_len")
    global_batch: Auto = Field(
        "auto", description="windows per optimizer step over all devices; auto: the hardware profile's"
    )
    batch_size: Auto = Field(
        "auto", description="micro-batch: windows per device and forward pass; auto: the most that fit in memory"
    )
    workers: int = Field(
        0, ge=0, le=64, description="threads that read batches ahead of training; 0: none, fast enough on local disks"
    )
    changed: Literal["refuse", "accept"] = Field(
        "refuse",
        description=("for one start: whether to resume although the text or its order has changed"),
    )

    @property
    def sequences(self) -> int:
        """Rows of a batch for each window: a pair of preferences takes two."""
        return 2 if self.format == "preferences" else 1

    @property
    def has_conversations(self) -> bool:
        """Whether some of the text needs the tokens around messages."""
        return any(corpus.format != "text" for corpus in (self, *self.parts.values()))

"""What must hold between the fields of the data section."""

from __future__ import annotations

from hybridlm.config.data import CorpusConfig, DataConfig, HfConfig
from hybridlm.config.problems import broken, show
from hybridlm.config.synthetic import SyntheticConfig, synthetic_problems


def data_problems(data: DataConfig) -> list[str]:
    """One line for each rule that is broken."""
    source = data.source
    mixture, bins, synthetic = source == "mixture", source == "bins", source == "synthetic"
    held_out = all(part.val_path for part in data.parts.values()) if mixture else data.val_path
    problems = _corpus_problems("data", data)
    for name, part in data.parts.items():
        problems += _corpus_problems(f"data.parts.{name}", part)
    problems += broken(
        (
            mixture and not data.parts,
            "data.parts = {}: data.source=mixture needs at least one, such as 'data.parts={web: {source: files, path:"
            ' "web/*.jsonl"}}\'',
        ),
        (
            not mixture and data.parts,
            f"data.parts = {{{', '.join(data.parts)}}}: only data.source=mixture reads them",
        ),
        (not bins and data.dtype is not None, f"data.dtype = {data.dtype!r}: only data.source=bins reads it"),
        (
            not data.val_fraction and not held_out and not synthetic,
            "data.val_fraction = 0: nothing is held out for validation; use more than 0, or set data.val_path",
        ),
        (
            not synthetic and data.synthetic != SyntheticConfig(),
            "data.synthetic: only data.source=synthetic reads it; add data=synthetic",
        ),
        (
            synthetic and data.packing,
            "data.packing = true: data.source=synthetic has no documents; each example is one window",
        ),
        (
            synthetic and data.dedup,
            "data.dedup = true: data.source=synthetic has no documents; each example is one window",
        ),
        (
            synthetic and data.val_seq_len is not None,
            f"data.val_seq_len = {data.val_seq_len}: data.source=synthetic validates at data.seq_len and"
            " data.synthetic.eval_lengths",
        ),
    )
    mixed = [f"data.parts.{name}" for name, part in data.parts.items() if part.format == "preferences"]
    mixed += ["data"] if mixture and data.format == "preferences" else []
    problems += [
        f"{where}.format = 'preferences': is not mixed with other data; use data=preferences" for where in mixed
    ]
    problems += broken(
        (
            data.format == "preferences" and data.packing,
            "data.packing = true: pairs of preferences are not packed; each takes two rows of data.seq_len tokens",
        )
    )
    problems += _token_problems(data)
    return problems + (synthetic_problems(data.synthetic, data.seq_len) if synthetic else [])


def _token_problems(data: DataConfig) -> list[str]:
    """Of token files, and of the tokenizer."""
    bins, tokenizer = data.source == "bins", data.tokenizer
    return broken(
        (
            bins and data.path is None,
            "data.path = null: data.source=bins needs a token file, such as data.path=train.bin",
        ),
        (
            bins and data.dedup,
            "data.dedup = true: data.source=bins reads tokens, whose documents are used as they are",
        ),
        (
            bins and tokenizer.kind != "file",
            f"data.tokenizer.kind = {tokenizer.kind!r}: data.source=bins needs file, with data.tokenizer.path set to"
            " the tokenizer of the ids: it is used to check them and to count bytes",
        ),
        (
            tokenizer.kind == "file" and not tokenizer.path,
            "data.tokenizer.path = null: kind=file needs it; a tokenizer.json, or a folder with one",
        ),
        (
            tokenizer.kind != "file" and tokenizer.path is not None,
            f"data.tokenizer.path = {tokenizer.path!r}: kind={tokenizer.kind} does not read it; add"
            " data.tokenizer.kind=file",
        ),
    )


def _corpus_problems(where: str, corpus: CorpusConfig) -> list[str]:
    source: str = corpus.source
    files = f"add {'data=files' if where == 'data' else 'source: files'}"
    return broken(
        (
            corpus.path is not None and source not in ("files", "bins"),
            f"{where}.path = {show(corpus.path)}: {where}.source={source} does not read it;"
            f" {f'name the data set with {where}.hf.id' if source == 'hf' else files}",
        ),
        (
            corpus.val_path is not None and source not in ("files", "bins"),
            f"{where}.val_path = {show(corpus.val_path)}: only {where}.source=files and bins read it",
        ),
        (
            source == "files" and corpus.path is None,
            f"{where}.path = null: {where}.source=files needs a file, a folder or a glob, such as"
            f" {where}.path='texts/**/*.txt'",
        ),
        (
            source == "hf" and corpus.hf.id is None,
            f"{where}.hf.id = null: {where}.source=hf needs a name, such as {where}.hf.id=roneneldan/TinyStories, or a"
            " local folder",
        ),
        (source != "hf" and corpus.hf != HfConfig(), f"{where}.hf: only {where}.source=hf reads it"),
        (
            source in ("stdlib", "bins", "synthetic") and corpus.format != "text",
            f"{where}.format = {corpus.format!r}: {where}.source={source} has no records; use files or hf",
        ),
    )

"""What must hold between the fields of the data section."""

from __future__ import annotations

from hybridlm.config.data import CorpusConfig, DataConfig, HfConfig
from hybridlm.config.problems import show
from hybridlm.config.synthetic import SyntheticConfig, synthetic_problems


def data_problems(data: DataConfig) -> list[str]:
    """One line for each rule that is broken."""
    problems = _corpus_problems("data", data)
    for name, part in data.parts.items():
        problems += _corpus_problems(f"data.parts.{name}", part)
    if data.source == "mixture" and not data.parts:
        problems.append(
            "data.parts = {}: data.source=mixture needs them; such as 'data.parts={web: {source: files, path:"
            ' "web/*.jsonl"}}\''
        )
    if data.source != "mixture" and data.parts:
        problems.append(f"data.parts = {{{', '.join(data.parts)}}}: only data.source=mixture reads them")
    if data.source == "bins":
        problems += _bins_problems(data)
    elif data.dtype is not None:
        problems.append(f"data.dtype = {data.dtype!r}: only data.source=bins reads it")
    held_out = all(part.val_path for part in data.parts.values()) if data.source == "mixture" else data.val_path
    if not data.val_fraction and not held_out and data.source != "synthetic":
        problems.append(
            "data.val_fraction = 0: nothing is held out to validate on; legal is more than 0, or texts in data.val_path"
        )
    if data.source == "synthetic":
        problems += _synthetic_problems(data)
    elif data.synthetic != SyntheticConfig():
        problems.append("data.synthetic: only data.source=synthetic reads it; add data=synthetic")
    return problems + _tokenizer_problems(data)


def _corpus_problems(where: str, corpus: CorpusConfig | DataConfig) -> list[str]:
    problems = []
    if corpus.source in ("stdlib", "hf", "mixture", "synthetic") and corpus.path is not None:
        files = "add data=files" if where == "data" else "add source: files"
        remedy = f"name the data set with {where}.hf.id" if corpus.source == "hf" else files
        problems.append(
            f"{where}.path = {show(corpus.path)}: {where}.source={corpus.source} does not read it; {remedy}"
        )
    if corpus.val_path is not None and corpus.source not in ("files", "bins"):
        problems.append(f"{where}.val_path = {show(corpus.val_path)}: only {where}.source=files and bins read it")
    for name in ("path", "val_path"):
        paths = getattr(corpus, name)
        if paths in ("", ()) or (isinstance(paths, tuple) and not all(paths)):
            problems.append(
                f"{where}.{name} = {show(paths)}: an empty path; legal is a file, a folder, a glob, or a list of these"
            )
    if corpus.source == "files" and corpus.path is None:
        problems.append(
            f"{where}.path = null: {where}.source=files needs it; a file, a folder or a glob, such as"
            f" {where}.path='texts/**/*.txt'"
        )
    if corpus.source == "hf" and corpus.hf.id is None:
        problems.append(
            f"{where}.hf.id = null: {where}.source=hf needs it; such as {where}.hf.id=roneneldan/TinyStories, or a"
            " local folder"
        )
    if corpus.source != "hf" and corpus.hf != HfConfig():
        problems.append(f"{where}.hf: only {where}.source=hf reads it")
    if corpus.source in ("stdlib", "bins", "synthetic") and corpus.format == "chat":
        problems.append(
            f"{where}.format = 'chat': {where}.source={corpus.source} holds no records; it takes files or hf"
        )
    return problems


def _bins_problems(data: DataConfig) -> list[str]:
    problems = []
    if data.path is None:
        problems.append("data.path = null: data.source=bins needs it; a token file, such as data.path=train.bin")
    if data.dedup:
        problems.append("data.dedup = true: data.source=bins holds tokens, whose documents are taken as they are")
    if data.tokenizer.kind != "file":
        problems.append(
            f"data.tokenizer.kind = {data.tokenizer.kind!r}: data.source=bins needs file, with data.tokenizer.path"
            " naming the tokenizer that made the ids: they are checked and bytes are counted with it"
        )
    return problems


def _synthetic_problems(data: DataConfig) -> list[str]:
    problems = [
        f"data.{name} = true: data.source=synthetic has no documents; an example is a window of its own"
        for name in ("packing", "dedup")
        if getattr(data, name)
    ]
    if data.val_seq_len is not None:
        problems.append(
            f"data.val_seq_len = {data.val_seq_len}: data.source=synthetic validates at data.seq_len and"
            " data.synthetic.eval_lengths"
        )
    return problems + synthetic_problems(data.synthetic, data.seq_len)


def _tokenizer_problems(data: DataConfig) -> list[str]:
    problems, tokenizer = [], data.tokenizer
    if tokenizer.kind == "file" and not tokenizer.path:
        problems.append("data.tokenizer.path = null: kind=file needs it; a tokenizer.json, or a folder with one")
    if tokenizer.kind != "file" and tokenizer.path is not None:
        problems.append(
            f"data.tokenizer.path = {tokenizer.path!r}: kind={tokenizer.kind} does not read it; add"
            " data.tokenizer.kind=file"
        )
    return problems

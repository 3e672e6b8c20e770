"""``hybridlm import``: a folder of transformers as a run folder that generates, chats, evaluates and exports again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hybridlm.config.data import DataConfig
from hybridlm.config.load import to_yaml
from hybridlm.config.run import RunConfig
from hybridlm.data.chat import template_of
from hybridlm.data.tokenizer import load_tokenizer
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.sealed import write_sealed
from hybridlm.interop.foreign import read_config, read_tensors
from hybridlm.interop.links import imported
from hybridlm.interop.writing import new_folder
from hybridlm.model.build import build_model
from hybridlm.runs.checkpoint import KEY, facts, refuse_misfits
from hybridlm.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Imported:
    """A new run folder. name: the architecture it came from."""

    folder: Path
    name: str
    parameters: int


def import_folder(source: Path, target: Path) -> Imported:
    """Writes the run folder ``target``. UserError, one line: ``source`` has no known architecture, holds what has no
    counterpart here, or is damaged; or ``target`` is there already. Nothing of the folder is executed."""
    if not source.is_dir():
        raise UserError(f"{source}: not a folder")
    found = read_config(source)
    architecture, section, vocab = found.architecture, found.section, found.vocab
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > vocab:
        raise UserError(f"{source}: its tokenizer has {tokenizer.vocab_size:,} ids, its model {vocab:,}")
    model = build_model(section, vocab)
    weights = imported(architecture.links(section), read_tensors(source), str(source))
    refuse_misfits(model, weights, source)
    with new_folder(target) as folder:
        run = RunFolder(folder)
        run.config.write_text(
            to_yaml(RunConfig(model=section, data=DataConfig(seq_len=found.context))), encoding="utf-8"
        )
        tokenizer.save(run.tokenizer)
        with suppress(ConfigError):  # a model of plain text
            template_of(tokenizer).save(folder)
        ours = facts(section, vocab, tokenizer.fingerprint, accumulate=1) | {"step": 0}
        write_sealed(run.weights, KEY, ours, {name: tensor.contiguous() for name, tensor in weights.items()})
    return Imported(target, architecture.name, sum(parameter.numel() for parameter in model.parameters()))

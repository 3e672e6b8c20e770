"""``hybridlm import``: a model of another program as a run folder, which generates, chats, evaluates, trains on and
exports again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hybridlm.config.data import DataConfig
from hybridlm.config.load import to_yaml
from hybridlm.config.run import RunConfig
from hybridlm.data.chat import template_of
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.sealed import write_sealed
from hybridlm.interop.foreign import names_an_architecture, read_config, read_tensors
from hybridlm.interop.incoming import NOTHING_TOLD, Incoming, Told
from hybridlm.interop.links import imported
from hybridlm.interop.nanochat import nanochat_file, read_nanochat
from hybridlm.interop.state_spaces import read_state_spaces
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


def import_folder(source: Path, target: Path, told: Told = NOTHING_TOLD) -> Imported:
    """Writes the run folder ``target``. UserError, one line: ``source`` has no known architecture, holds what has no
    counterpart here, or is damaged; it does not say what ``told`` does not either; or ``target`` is there already.
    Nothing of the folder is executed."""
    if not source.is_dir():
        raise UserError(f"{source}: not a folder")
    tokenizer = _tokenizer(source, told)
    found = _read(source, told, tokenizer.vocab_size)
    if tokenizer.vocab_size > found.vocab:
        raise UserError(f"{source}: its tokenizer has {tokenizer.vocab_size:,} ids, its model {found.vocab:,}")
    section, weights = found.section, found.weights
    model = build_model(section, found.vocab)
    refuse_misfits(model, weights, source)
    if tokenizer.vocab_size < found.vocab:  # so that it trains on with all its rows
        section = section.model_copy(update={"vocab_size": found.vocab})
    with new_folder(target) as folder:
        run = RunFolder(folder)
        run.config.write_text(
            to_yaml(RunConfig(model=section, data=DataConfig(seq_len=found.context))), encoding="utf-8"
        )
        tokenizer.save(run.tokenizer)
        with suppress(ConfigError):  # a model of plain text
            template_of(tokenizer).save(folder)
        ours = facts(section, found.vocab, tokenizer.fingerprint, accumulate=1) | {"step": 0}
        write_sealed(run.weights, KEY, ours, {name: tensor.contiguous() for name, tensor in weights.items()})
    return Imported(target, found.name, sum(parameter.numel() for parameter in model.parameters()))


def _tokenizer(source: Path, told: Told) -> Tokenizer:
    if told.tokenizer is None and not (source / "tokenizer.json").is_file():
        raise UserError(f"{source}: holds no tokenizer that can be read; add --tokenizer FOLDER, with a tokenizer.json")
    return load_tokenizer(told.tokenizer or source)


def _read(source: Path, told: Told, ids: int) -> Incoming:
    """The model in a folder of a format that is known by its files. ids: of the tokenizer."""
    if (checkpoint := nanochat_file(source)) is not None:
        found = read_nanochat(checkpoint, told, ids)
    elif not names_an_architecture(source):
        found = read_state_spaces(source, told, ids)
    else:
        known = read_config(source)
        weights = imported(known.architecture.links(known.section), read_tensors(source), str(source))
        found = Incoming(known.architecture.name, known.section, known.vocab, known.context, weights)
    of_nanochat, of_mamba3 = checkpoint is not None, "mamba3" in found.section.kinds
    if told.rope_theta is not None and not of_nanochat:
        raise UserError("--rope-theta: only for checkpoints of nanochat; this one records its own")
    if told.a_activation is not None and not of_mamba3:
        raise UserError("--a-activation: only for checkpoints of Mamba-3")
    return found

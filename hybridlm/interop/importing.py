"""``hybridlm import``: a model of another program as a run folder, which generates, chats, evaluates, trains on and
exports again."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hybridlm.config.data import DataConfig
from hybridlm.config.load import to_yaml
from hybridlm.config.model import ModelConfig
from hybridlm.config.run import RunConfig
from hybridlm.data.chat import template_of
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.sealed import write_sealed
from hybridlm.interop.foreign import names_an_architecture, read_config, read_tensors
from hybridlm.interop.incoming import NOTHING_TOLD, Incoming, Told, fitted
from hybridlm.interop.links import imported
from hybridlm.interop.nanochat import nanochat_file, read_nanochat
from hybridlm.interop.state_spaces import read_state_spaces
from hybridlm.interop.writing import new_folder
from hybridlm.model.lm import HybridLM
from hybridlm.runs.checkpoint import KEY, facts, rebuilt, refuse_misfits
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
    _refuse_outside(source)
    tokenizer = _tokenizer(source, told)
    found = _read(source, told, tokenizer.vocab_size)
    if tokenizer.vocab_size > found.vocab:
        raise UserError(f"{source}: its tokenizer has {tokenizer.vocab_size:,} ids, its model {found.vocab:,}")
    section, weights = found.section, found.weights
    model = _built(section, found.vocab, source)
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


def _refuse_outside(source: Path) -> None:
    """UserError: it is no folder that can be read, or a link in it leads out of it; in the cache of a hub all lead to
    the blobs beside its snapshots."""
    try:
        real = source.resolve(strict=True)
        links = [path for path in real.iterdir() if path.is_symlink()]
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a link to itself"
        raise UserError(f"{source}: not a folder that can be read ({reason})") from None
    blobs = real.parent.parent / "blobs" if real.parent.name == "snapshots" else real
    for path in links:
        if not {real, blobs}.intersection(Path(os.path.realpath(path)).parents):
            raise UserError(f"{source / path.name}: a link to something outside of the folder; replace it by a copy")


def _built(section: ModelConfig, vocab: int, source: Path) -> HybridLM:
    return rebuilt({"model": section.model_dump(), "vocab_size": vocab}, source, section)


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
        known, tensors = read_config(source), read_tensors(source)
        model = _built(known.section, known.vocab, source)
        described = sum(parameter.numel() for parameter in model.parameters())
        if described > (held := sum(tensor.numel() for tensor in tensors.values())):  # links alone may be a billion
            raise UserError(f"{source}: its config.json describes {described:,} weights, its files hold {held:,}")
        weights = fitted(imported(known.architecture.links(known.section), tensors, str(source)), model)
        found = Incoming(known.architecture.name, known.section, known.vocab, known.context, weights)
    of_nanochat, of_mamba3 = checkpoint is not None, "mamba3" in found.section.kinds
    if told.rope_theta is not None and not of_nanochat:
        raise UserError("--rope-theta: only for checkpoints of nanochat; this one records its own")
    if told.a_activation is not None and not of_mamba3:
        raise UserError("--a-activation: only for checkpoints of Mamba-3")
    return found

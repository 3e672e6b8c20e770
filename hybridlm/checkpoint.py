"""What our part of a checkpoint holds, and how a run is loaded again. Loading never runs code from the file."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybridlm.config.load import validate_model
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError
from hybridlm.files.checksum import damage, has_line
from hybridlm.files.sealed import read_sealed, write_sealed
from hybridlm.hardware.device import CPU
from hybridlm.model.build import build_model
from hybridlm.run_folder import RunFolder, find_run

if TYPE_CHECKING:
    from hybridlm.config.model import ModelConfig
    from hybridlm.model.lm import HybridLM

FORMAT_VERSION = 2  # 2: a checksum at the end of the file
KEY = "hybridlm"  # of our part among Lightning's
EMA_KEY = "hybridlm_ema"  # {name of a parameter: its running average in fp32}, where the run keeps one
PREFIX = "model."  # of the model's tensors in Lightning's state dict


def facts(config: ModelConfig, vocab_size: int, tokenizer_fingerprint: str, accumulate: int) -> dict[str, Any]:
    """Our part of a checkpoint: enough to rebuild the model, to know its tokenizer and how its steps were cut, in plain types."""
    return {
        "format_version": FORMAT_VERSION,
        "model": config.model_dump(mode="python"),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_fingerprint,
        "accumulate": accumulate,
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's content, tensors memory-mapped.

    ConfigError: damaged, unreadable, not ours, carries code, or from another format version.
    """
    problem = damage(path)
    if problem is not None and _has_checksum(path):  # ours, once: what its bytes say now means nothing
        raise UserError(f"{path}: {problem}")
    try:
        content = torch.load(path, map_location=CPU, weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, the file holds more than tensors and plain values (loading it could run code)") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0][:120]})") from None
    ours = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(ours, dict):
        raise UserError(f"{path}: a checkpoint, but not one of hybridlm's (it has no '{KEY}' entry)")
    if ours.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format version {ours.get('format_version')}, this program reads {FORMAT_VERSION}")
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    return content


def _has_checksum(path: Path) -> bool:
    try:
        return has_line(path)
    except OSError:
        return False


def export_weights(checkpoint: Path, target: Path) -> None:
    """Writes the weights of a checkpoint, as they were trained and without the optimizer, to the safetensors file ``target``.

    Its metadata holds what rebuilds the model: our part of the checkpoint and the step, as JSON, and a checksum over that and every tensor.
    Weights that are tied are there once. ConfigError: the checkpoint cannot be read; OSError: the file cannot be written.
    """
    content = read_checkpoint(checkpoint)
    weights = {key.removeprefix(PREFIX): tensor.contiguous() for key, tensor in content["state_dict"].items() if key.startswith(PREFIX)}
    write_sealed(target, KEY, {**content[KEY], "step": int(content["global_step"])}, weights)


def read_weights(path: Path) -> dict[str, Any]:
    """A file of ``export_weights`` in the form of a checkpoint: ``state_dict``, ``global_step`` and our part. ConfigError: damaged, or none
    of ours."""
    ours, weights = read_sealed(path, KEY, FORMAT_VERSION, "weights of hybridlm")
    return {"state_dict": {PREFIX + name: tensor for name, tensor in weights.items()}, "global_step": ours.pop("step"), KEY: ours}


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready to use, and where it came from."""

    model: HybridLM
    tokenizer: Tokenizer
    folder: RunFolder
    checkpoint: Path
    step: int


def load_run(name: str, device: torch.device, *, ema: bool = False) -> LoadedRun:
    """Loads ``last`` (the newest run), a run folder (its newest checkpoint), or a checkpoint or safetensors file in one, to evaluate.

    ema: the running average of the weights in place of the last ones.
    ConfigError: nothing there, unreadable, no average in it, or the tokenizer beside it is another one.
    """
    folder, path = find_run(name)
    content = read_weights(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    ours = content[KEY]
    tokenizer = Tokenizer.load(folder.tokenizer)
    if tokenizer.fingerprint != ours["tokenizer"]:
        raise UserError(f"{folder.tokenizer}: not the tokenizer that {path} was trained with")
    model = build_model(validate_model(ours["model"]), ours["vocab_size"])
    weights = {key.removeprefix(PREFIX): tensor for key, tensor in content["state_dict"].items() if key.startswith(PREFIX)}
    if ema and EMA_KEY not in content:
        raise UserError(f"{path}: holds no running average of the weights; train with callbacks=ema")
    if ema:
        weights |= content[EMA_KEY]
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its own model section ({str(error).splitlines()[-1].strip()[:160]})") from None
    return LoadedRun(model.to(device).eval(), tokenizer, folder, path, int(content["global_step"]))

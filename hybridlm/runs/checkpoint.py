"""Our part of a checkpoint, and loading a trained run. Loading never runs code from the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from hybridlm.config.load import validate_model
from hybridlm.config.model import ModelConfig
from hybridlm.config.problems import recorded
from hybridlm.config.section import Section
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import UserError, printable
from hybridlm.files.archive import read_archive
from hybridlm.files.checksum import damage
from hybridlm.files.plain import Unreadable
from hybridlm.files.sealed import read_sealed, write_sealed
from hybridlm.model.build import build_model
from hybridlm.model.lm import HybridLM
from hybridlm.ops.norm import at_least_fp32
from hybridlm.runs.run_folder import RunFolder, find_run

FORMAT_VERSION = 2  # 2: a checksum at the end of the file
KEY = "hybridlm"  # of our part among Lightning's
EMA_KEY = "hybridlm_ema"  # {name of a parameter: its running average in fp32}, where the run keeps one
_TRAINED_IN = (torch.float64, torch.float32, torch.bfloat16)
_FLOATS = (*_TRAINED_IN, torch.float16)
PREFIX = "model."  # of the model's tensors in Lightning's state dict


class Facts(Section):
    """Our part of a checkpoint."""

    model_config = ConfigDict(extra="ignore")

    format_version: Literal[2]
    model: dict[str, object]  # the model section
    vocab_size: int = Field(ge=1, lt=2**31)
    tokenizer: str  # its fingerprint
    accumulate: int = Field(ge=1, lt=2**31)
    data: dict[str, object] = {}  # what determines the tokens of each step, by field


class WeightsFacts(Facts):
    """Those of a file with the weights only."""

    step: int = Field(ge=0, lt=2**62)


class Content(Section):
    """What all readers of a checkpoint rely on."""

    model_config = ConfigDict(extra="ignore", arbitrary_types_allowed=True)

    global_step: int = Field(ge=0, lt=2**62)
    state_dict: dict[str, Tensor]
    hybridlm: Facts
    hybridlm_ema: dict[str, Tensor] | None = None


def facts(
    config: ModelConfig,
    vocab_size: int,
    tokenizer_fingerprint: str,
    accumulate: int,
    data: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Our part of a checkpoint, in plain types: what is needed to rebuild the model, and to check its tokenizer, the
    split of its batches and its data.

    data: what determines the tokens of each step, by field."""
    return {
        "format_version": FORMAT_VERSION,
        "model": config.model_dump(mode="python"),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_fingerprint,
        "accumulate": accumulate,
        "data": dict(data or {}),
    }


def read_checkpoint(path: Path, *, verified: bool = False) -> dict[str, Any]:
    """The checkpoint's content, tensors memory-mapped. verified: its checksum was verified just now.

    UserError: damaged, unreadable, not ours, contains code, or from another format version.
    """
    if not verified and (problem := damage(path)) is not None:
        raise UserError(f"{path}: {problem}")
    try:
        content = read_archive(path)
    except Unreadable as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get(KEY), dict):
        raise UserError(f"{path}: not a checkpoint of hybridlm (it has no '{KEY}' entry)")
    version = content[KEY].get("format_version")
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}")
    recorded(Content, content, path)
    return content


def weights_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, by their names in the model."""
    return {key.removeprefix(PREFIX): value for key, value in content["state_dict"].items() if key.startswith(PREFIX)}


def export_weights(checkpoint: Path, target: Path) -> None:
    """Writes the weights of a checkpoint, without the optimizer state, to the safetensors file ``target``.

    Its metadata holds what is needed to rebuild the model: our part of the checkpoint and the step, as JSON, and a
    checksum over that and every tensor. Tied weights are stored once. UserError: the checkpoint cannot be read;
    OSError: the file cannot be written.
    """
    content = read_checkpoint(checkpoint)
    weights = {name: tensor.contiguous() for name, tensor in weights_of(content).items()}
    write_sealed(target, KEY, {**content[KEY], "step": int(content["global_step"])}, weights)


def read_weights(path: Path) -> dict[str, Any]:
    """A file of ``export_weights`` in the form of a checkpoint: ``state_dict``, ``global_step`` and our part.
    UserError: damaged, or not such a file."""
    ours, weights = read_sealed(path, KEY, FORMAT_VERSION, "weights of hybridlm")
    recorded(WeightsFacts, ours, path)
    return {
        "state_dict": {PREFIX + name: tensor for name, tensor in weights.items()},
        "global_step": ours.pop("step"),
        KEY: ours,
    }


def read_content(path: Path, *, verified: bool = False) -> dict[str, Any]:
    """A checkpoint, or a file with the weights only, as ``read_checkpoint``."""
    return read_weights(path) if path.suffix == ".safetensors" else read_checkpoint(path, verified=verified)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready to use, and its origin."""

    model: HybridLM
    tokenizer: Tokenizer
    folder: RunFolder
    checkpoint: Path
    step: int


def load_run(name: str, device: torch.device, *, ema: bool = False, built: HybridLM | None = None) -> LoadedRun:
    """Loads ``last`` (the newest run), a run folder (its newest checkpoint), or a checkpoint or safetensors file in
    one, to evaluate.

    ema: the running average of the weights in place of the last ones; built: a model on "meta", which gets the weights
    if it is the one of the checkpoint.
    UserError: nothing there, unreadable, no average in it, or the tokenizer next to it is a different one.
    """
    folder, named = find_run(name)
    path = named or folder.newest_checkpoint()
    content = read_content(path, verified=named is None)
    ours = content[KEY]
    tokenizer = Tokenizer.load(folder.tokenizer)
    if tokenizer.fingerprint != ours["tokenizer"]:
        raise UserError(f"{folder.tokenizer}: not the tokenizer of {path}")
    model = rebuilt(ours, path, built)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder.tokenizer}: {tokenizer.vocab_size:,} ids, but the model of {path} has {model.vocab_size:,}"
        )
    weights = weights_of(content)
    if ema and EMA_KEY not in content:
        raise UserError(f"{path}: has no running average of the weights; train with callbacks=ema")
    if ema:
        weights |= content[EMA_KEY]
    refuse_misfits(model, weights, path)
    model.load_state_dict(weights, assign=True)
    return LoadedRun(model.to(device).eval(), tokenizer, folder, path, int(content["global_step"]))


def rebuilt(ours: Mapping[str, Any], path: Path, known: ModelConfig | HybridLM | None = None) -> HybridLM:
    """The model on "meta" that our part of a checkpoint describes: however large, it takes no memory. known: what has
    been built, or resolved, already, used where it is the same. UserError: there is no such model."""
    try:
        section = validate_model(ours["model"])
        config = known.config if isinstance(known, HybridLM) else known
        if isinstance(known, HybridLM) and (config, known.vocab_size) == (section, ours["vocab_size"]):
            return known
        return build_model(config if config == section else section, ours["vocab_size"])
    except UserError as error:
        raise UserError([f"{path}: {problem}" for problem in error.problems[:1]]) from None
    except (
        ArithmeticError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # sizes no tensor has
        reason = (str(error).splitlines() or ["too large"])[0][:120]
        raise UserError(f"{path}: no model can be built from its model section ({reason})") from None


def refuse_misfits(model: HybridLM, weights: Mapping[str, Tensor], path: Path) -> None:
    """UserError: names, shapes or dtypes of ``weights`` do not match ``model``, in any dtype of training."""
    if problem := _misfit(model, weights):
        raise UserError(f"{path}: its weights do not match its model section ({problem})")


def refuse_unfinite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """UserError: a tensor holds numbers that are not finite, or has a dtype that weights here never have."""
    for name, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
            raise UserError(
                f"{where}: {printable(name[:100])} is {tensor.dtype}; expected float64, float32, bfloat16 or float16"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {printable(name[:100])} holds numbers that are not finite")


def _misfit(model: HybridLM, weights: Mapping[str, Tensor]) -> str | None:
    own = model.state_dict()
    if wrong := sorted(own.keys() ^ weights.keys()):
        return f"it {'lacks' if wrong[0] in own else 'has no place for'} {printable(wrong[0])}"
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            return f"{name} has shape {tuple(weights[name].shape)}, the model {tuple(tensor.shape)}"
    specs = model.param_specs()  # after the sizes, as they take memory in proportion to what is declared
    rounded = weights["embedding.weight"].dtype
    for name, tensor in own.items():
        legal = [torch.float32, torch.float64] if tensor.is_floating_point() else [tensor.dtype]
        if name in specs:
            legal = [rounded if specs[name].dtype == "model" else at_least_fp32(rounded)]
        if weights[name].dtype not in legal or rounded not in _TRAINED_IN:
            return f"{name} is {weights[name].dtype}"
    return None

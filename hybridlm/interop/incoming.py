"""What an import reads, whatever it reads it from, and what it has to be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hybridlm.config.model import ModelConfig
from hybridlm.errors import UserError, printable
from hybridlm.files.archive import read_archive
from hybridlm.files.plain import Unreadable
from hybridlm.model.lm import HybridLM
from hybridlm.ops.norm import at_least_fp32
from hybridlm.runs.checkpoint import refuse_unfinite


@dataclass(frozen=True)
class Told:
    """What some checkpoints do not record. tokenizer: a file or folder; rope_theta: base of the rotary positions;
    a_activation: of Mamba-3."""

    tokenizer: Path | None = None
    rope_theta: float | None = None
    a_activation: Literal["softplus", "heavy_tail"] | None = None


NOTHING_TOLD = Told()


@dataclass(frozen=True)
class Incoming:
    """A model from elsewhere. name: the format, for people; vocab: rows of the embedding; context: tokens of a text
    that it was made for; weights: by our names."""

    name: str
    section: ModelConfig
    vocab: int
    context: int
    weights: Mapping[str, Tensor]


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, by name, in fp32. No code runs: a file with more than tensors and plain
    values is refused. UserError: that, or it is damaged."""
    try:
        content = read_archive(path, shared=True)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected tensors by name")
    if others := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: {printable(others[0][:100])} is not a tensor")
    tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in content.items()}
    refuse_unfinite(tensors, path)
    return wide(tensors)


def wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In fp32, where checkpoints mix dtypes. Tensors that share memory still do where they were wide already."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def fitted(weights: Mapping[str, Tensor], model: HybridLM) -> dict[str, Tensor]:
    """All weights of ``model`` in dtypes that it is trained in and that hold every value of theirs: half precision in
    fp32, and what is never rounded here, such as A_log, in fp32 at least."""
    rounds = {name: spec.dtype == "model" for name, spec in model.param_specs().items()}
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    rounded = [tensor.dtype for name, tensor in floats.items() if rounds.get(name)]
    common = reduce(torch.promote_types, rounded, torch.float32 if torch.float16 in rounded else torch.bfloat16)
    legal = {name: common if rounds.get(name) else at_least_fp32(common) for name in floats}
    return dict(weights) | {
        name: tensor.to(torch.promote_types(tensor.dtype, legal[name])) for name, tensor in floats.items()
    }


def rows_for(tensors: Mapping[str, Tensor], name: str, ids: int, where: Path) -> Tensor:
    """The rows of a padded embedding, or head, that a tokenizer has ids for. UserError: there are fewer."""
    rows = tensors[name]
    if rows.ndim != 2 or len(rows) < ids:
        raise UserError(f"{where}: the tokenizer has {ids:,} ids, {name} has shape {tuple(rows.shape)}")
    return rows[:ids]

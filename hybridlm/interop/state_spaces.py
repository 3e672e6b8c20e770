"""Checkpoints of the package mamba_ssm (the state-spaces repositories): stacks of Mamba-1, Mamba-2 or Mamba-3.

All sizes come from the tensors, since a config.json may be that of another size. It is read for what shapes cannot
tell: groups of B and C, limits of the step, the order of norm and gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridlm.config.load import validate_model
from hybridlm.config.model import ModelConfig
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import Unreadable, read_json
from hybridlm.interop.architecture import pattern_text
from hybridlm.interop.blocks import MAMBA1, MAMBA2
from hybridlm.interop.foreign import read_tensors
from hybridlm.interop.incoming import Incoming, Told, read_pickled, rows_for, wide
from hybridlm.interop.links import Link, imported, joined, same

PICKLE = "pytorch_model.bin"
EMBEDDING = "backbone.embedding.weight"
_LAYER = re.compile(r"backbone\.layers\.(\d{1,3})\.")
_EPS = 1e-5  # the package's; no config.json records another
_MIMO = ("mimo_x", "mimo_z", "mimo_o")
_MAMBA3 = ("in_proj.weight", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "D", "out_proj.weight")
# Of ssm_cfg: what shapes tell, and what only initialises or only changes speed.
_SHAPES = {
    *("layer", "d_state", "d_conv", "expand", "headdim", "dt_rank", "bias", "conv_bias", "d_ssm", "D_has_hdim"),
    *("rmsnorm", "is_mimo", "mimo_rank", "is_outproj_norm", "rope_fraction", "dt_min", "dt_max", "dt_init"),
    *("dt_scale", "dt_init_floor", "A_init_range", "conv_init", "use_fast_path", "use_mem_eff_path", "chunk_size"),
}
_READ = {"ngroups", "dt_limit", "norm_before_gate", "A_floor"}


def read_state_spaces(folder: Path, told: Told, ids: int) -> Incoming:
    """ids: of the tokenizer; the rows behind them are padding. UserError: a part has no counterpart here, by name, or
    the activation of Mamba-3 was not told."""
    pickled = (folder / PICKLE).is_file() and not (folder / "model.safetensors").is_file()
    tensors = read_pickled(folder / PICKLE) if pickled else wide(read_tensors(folder))
    if EMBEDDING not in tensors:
        raise UserError(
            f"{folder}: neither a config.json with an architecture of transformers, nor model_*.pt of nanochat, nor"
            f" {EMBEDDING} of mamba_ssm"
        )
    tensors[EMBEDDING] = rows_for(tensors, EMBEDDING, ids, folder)
    if (head := tensors.get("lm_head.weight")) is not None:
        tensors["lm_head.weight"] = rows_for(tensors, "lm_head.weight", ids, folder)
        if head.shape[0] >= ids and tensors["lm_head.weight"].equal(tensors[EMBEDDING]):
            del tensors["lm_head.weight"]
    try:
        section = _section(tensors, _ssm_cfg(folder), told)
        links = _links(section, tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{folder}: it lacks a tensor, or one is misshapen ({printable(str(error)[:80])})") from None
    except UserError as error:
        raise UserError([f"{folder}: {problem}" for problem in error.problems[:1]]) from None
    weights = imported(links, tensors, str(folder))
    return Incoming(f"a checkpoint of mamba_ssm ({section.name})", section, ids, 2048, weights)


def _ssm_cfg(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = read_json(path) if path.exists() else {}
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    found = config.get("ssm_cfg") or {} if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, whose ssm_cfg is one")
    if unknown := sorted(found.keys() - _SHAPES - _READ):
        raise UserError(f"{path}: ssm_cfg.{printable(unknown[0][:60])} has no counterpart here")
    return found


def _section(tensors: Mapping[str, Tensor], ssm: Mapping[str, Any], told: Told) -> ModelConfig:
    """KeyError, IndexError, ValueError, ZeroDivisionError: a tensor is missing or misshapen. UserError: it has no
    counterpart."""
    numbers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    layers = [f"backbone.layers.{i}." for i in range(max(numbers, default=-1) + 1)]
    kinds = [_kind(tensors, layer) for layer in layers]
    d_model = tensors[EMBEDDING].shape[1]
    section: dict[str, Any] = {
        "name": "-".join(dict.fromkeys(kinds)),
        "d_model": d_model,
        "norm_eps": _EPS,
        "tie_embeddings": "lm_head.weight" not in tensors,
        "vocab_multiple": 1,
    }
    ffns = ["mlp" if f"{layer}mlp.fc2.weight" in tensors else "none" for layer in layers]
    section["pattern"] = pattern_text(zip([f"M{kind[-1]}" for kind in kinds], ffns, strict=True))
    for kind, layer in reversed([*zip(kinds, layers, strict=True)]):
        mixer = {name.removeprefix(f"{layer}mixer."): t for name, t in tensors.items() if name.startswith(layer)}
        shapes = {name: tuple(tensor.shape) for name, tensor in mixer.items()}
        section[kind] = _SECTIONS[kind](shapes, d_model, ssm)
        if kind == "mamba3":
            if told.a_activation is None:
                raise UserError("a checkpoint of Mamba-3 does not record its activation; add --a-activation softplus")
            section[kind]["a_activation"] = told.a_activation
    if "mlp" in ffns:
        section["mlp"] = {
            "d_ff": tensors[f"{layers[ffns.index('mlp')]}mlp.fc2.weight"].shape[1],
            "activation": "swiglu",
        }
    return validate_model(section)


def _kind(tensors: Mapping[str, Tensor], layer: str) -> str:
    for kind, own in (("mamba1", "x_proj.weight"), ("mamba3", "B_bias"), ("mamba2", "A_log")):
        if f"{layer}mixer.{own}" in tensors:
            return kind
    raise UserError(f"{layer}mixer: not a layer of Mamba; attention of mamba_ssm has no counterpart here")


Shapes = Mapping[str, tuple[int, ...]]


def _mamba1(shapes: Shapes, d_model: int, ssm: Mapping[str, Any]) -> dict[str, Any]:
    d_inner, d_state = shapes["A_log"]
    return {
        "d_state": d_state,
        "d_conv": shapes["conv1d.weight"][2],
        "expand": d_inner / d_model,
        "dt_rank": shapes["dt_proj.weight"][1],
        "bias": "in_proj.bias" in shapes,
    }


def _mamba2(shapes: Shapes, d_model: int, ssm: Mapping[str, Any]) -> dict[str, Any]:
    d_inner, (n_heads,), groups = shapes["out_proj.weight"][1], shapes["A_log"], _groups(ssm)
    limits = ssm.get("dt_limit", [0.0, float("inf")])
    return {
        "d_state": (shapes["conv1d.weight"][0] - d_inner) // (2 * groups),
        "d_conv": shapes["conv1d.weight"][2],
        "expand": d_inner / d_model,
        "head_dim": d_inner // n_heads,
        "n_groups": groups,
        "dt_limit": limits,
        "norm_before_gate": ssm.get("norm_before_gate", False),
    }


def _mamba3(shapes: Shapes, d_model: int, ssm: Mapping[str, Any]) -> dict[str, Any]:
    """Of in_proj's rows, those of B and C are a multiple of 2 R N, and the angles behind them fewer than that."""
    (n_heads, rank, d_state), d_inner = shapes["B_bias"], shapes["out_proj.weight"][1]
    groups, angles = divmod(shapes["in_proj.weight"][0] - 2 * d_inner - 3 * n_heads, 2 * rank * d_state)
    return {
        "d_state": d_state,
        "expand": d_inner / d_model,
        "head_dim": d_inner // n_heads,
        "n_groups": groups,
        "mimo_rank": rank if "mimo_x" in shapes else None,
        "rope_fraction": 1.0 if angles == d_state // 2 else 0.5,
        "a_floor": ssm.get("A_floor", 1e-4),
        "outproj_norm": "norm.weight" in shapes,
    }


_SECTIONS = {"mamba1": _mamba1, "mamba2": _mamba2, "mamba3": _mamba3}


def _groups(ssm: Mapping[str, Any]) -> int:
    groups = ssm.get("ngroups", 1)
    if not isinstance(groups, int) or groups < 1:
        raise UserError(f"ssm_cfg.ngroups = {printable(str(groups)[:40])}: not a number of groups")
    return groups


def _links(section: ModelConfig, tensors: Mapping[str, Tensor]) -> list[Link]:
    links = [same("embedding.weight", EMBEDDING), same("norm.weight", "backbone.norm_f.weight")]
    if not section.tie_embeddings:
        links.append(same("lm_head.weight", "lm_head.weight"))
    for i, layer in enumerate(section.layers):
        ours, theirs = f"blocks.{i}.", f"backbone.layers.{i}."
        names = {"mamba1": MAMBA1, "mamba2": MAMBA2, "mamba3": _MAMBA3}[layer.kind]
        spec: Any = layer.params
        extra = (
            ["in_proj.bias", "out_proj.bias"] if layer.kind == "mamba1" and spec.bias else [],
            _MIMO if layer.kind == "mamba3" and spec.mimo_rank is not None else [],
            ["norm.weight"] if layer.kind == "mamba3" and spec.outproj_norm else [],
        )
        links.append(same(f"{ours}mixer_norm.weight", f"{theirs}norm.weight"))
        links += [same(f"{ours}mixer.{name}", f"{theirs}mixer.{name}") for name in chain(names, *extra)]
        if layer.ffn is not None:
            links.append(same(f"{ours}ffn_norm.weight", f"{theirs}norm2.weight"))
            links.append(
                joined([f"{ours}ffn.up_proj.weight", f"{ours}ffn.gate_proj.weight"], f"{theirs}mlp.fc1.weight")
            )
            links.append(same(f"{ours}ffn.down_proj.weight", f"{theirs}mlp.fc2.weight"))
    return links

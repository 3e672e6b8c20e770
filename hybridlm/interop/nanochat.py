"""Base checkpoints of nanochat, of its plain generation: rotary attention with QK-norm, squared ReLU, an untied head,
soft-capped logits, and norms without weights, one of them behind the embedding.

Exact except for what its training rounds: its cosines and sines are in bf16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm.config.load import validate_model
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import Unreadable, read_json
from hybridlm.interop.incoming import Incoming, Told, read_pickled, rows_for
from hybridlm.interop.links import Link, changed, imported, same

_EPS = torch.finfo(torch.float32).eps  # what torch's rms_norm takes where none is given
_CAP = 15.0
_MODEL = re.compile(r"model_(\d{1,9})\.pt")
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
# Of later generations, by a part of the name: nothing here computes them.
_LATER = ("value_embeds", "ve_gate", "smear", "backout_lambda")
_NEUTRAL = {"resid_lambdas": 1.0, "x0_lambdas": 0.0}  # of later generations, where they change nothing


def nanochat_file(folder: Path) -> Path | None:
    """Its newest checkpoint, or None."""
    found = {int(match[1]): path for path in folder.glob("model_*.pt") if (match := _MODEL.fullmatch(path.name))}
    return found[max(found)] if found else None


def read_nanochat(path: Path, told: Told, ids: int) -> Incoming:
    """The checkpoint ``path``, with its metadata beside it. ids: of the tokenizer; the rows behind them are padding.
    UserError: a part has no counterpart here, by name, or the base of the rotary positions was not told."""
    if told.rope_theta is None:
        raise UserError(
            f"{path}: does not record the base of its rotary positions; add --rope-theta 10000, or the 100000 of later"
            " versions of nanochat"
        )
    config, tensors = _config(path), read_pickled(path)
    _drop_later(tensors, path)
    for name in (_EMBEDDING, _HEAD):
        if name not in tensors:
            raise UserError(f"{path}: it lacks {name}")
        tensors[name] = rows_for(tensors, name, ids, path)
    d_model, depth = tensors[_EMBEDDING].shape[1], 1 + max(_depths(tensors), default=-1)
    hidden = tensors.get("transformer.h.0.mlp.c_fc.weight", torch.empty(0))
    heads = {ours: config.get(theirs) for ours, theirs in (("n_heads", "n_head"), ("n_kv_heads", "n_kv_head"))}
    section = {
        "name": "nanochat",
        "d_model": d_model,
        "n_layers": depth,
        "attention": {**heads, "rope": True, "rope_theta": told.rope_theta, "qk_norm": True},
        "mlp": {"d_ff": len(hidden) if hidden.ndim else 0, "activation": "relu2"},
        "tie_embeddings": False,
        "logit_softcap": _CAP,
        "norm_eps": _EPS,
        "vocab_multiple": 1,
    }
    try:
        model = validate_model(section)
        head_dim = model.layers[0].params.head_dim  # type: ignore[attr-defined]
    except UserError as error:
        raise UserError([f"{path}: {problem}" for problem in error.problems[:1]]) from None
    weights = imported(_links(depth, head_dim), tensors, str(path)) | _norms(depth, d_model, head_dim)
    context = config.get("sequence_len")
    context = context if isinstance(context, int) and 2 <= context < 2**20 else 2048
    return Incoming("a checkpoint of nanochat", model, ids, context, weights)


def _config(path: Path) -> Mapping[str, Any]:
    meta = path.with_name(path.name.replace("model_", "meta_", 1)).with_suffix(".json")
    try:
        content = read_json(meta)
    except Unreadable as error:
        raise UserError(f"{meta}: {error}") from None
    config = content.get("model_config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{meta}: expected a JSON object with a model_config")
    windows = config.get("window_pattern", "L")
    if not isinstance(windows, str) or set(windows.upper()) != {"L"}:
        raise UserError(
            f"{meta}: window_pattern = {printable(str(windows)[:40])}: its windows have no counterpart here"
        )
    return config


def _depths(tensors: Mapping[str, Tensor]) -> set[int]:
    return {int(match[1]) for name in tensors if (match := re.match(r"transformer\.h\.(\d{1,3})\.", name))}


def _drop_later(tensors: dict[str, Tensor], path: Path) -> None:
    """Takes out what changes nothing. UserError: a tensor of a later generation does."""
    for name in sorted(tensors):
        if any(part in name for part in _LATER):
            raise UserError(f"{path}: {printable(name[:100])} is of a later nanochat and has no counterpart here")
        if (neutral := _NEUTRAL.get(name)) is not None and not bool((tensors.pop(name) == neutral).all()):
            raise UserError(f"{path}: {name} is not {neutral:g} everywhere, which has no counterpart here")


def _links(depth: int, head_dim: int) -> list[Link]:
    def normalised(rows: Tensor) -> Tensor:
        result: Tensor = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + _EPS)
        return result

    def turned(rows: Tensor) -> Tensor:
        """It rotates by the negative angle, which is the positive one where the halves of a head are swapped."""
        return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).flip(1).reshape(rows.shape)

    links = [changed("embedding.weight", _EMBEDDING, torch.clone, normalised), same(_HEAD, _HEAD)]
    for i in range(depth):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        links += [
            *(changed(f"{ours}mixer.{x}_proj.weight", f"{theirs}attn.c_{x}.weight", turned, turned) for x in "qk"),
            same(f"{ours}mixer.v_proj.weight", f"{theirs}attn.c_v.weight"),
            same(f"{ours}mixer.o_proj.weight", f"{theirs}attn.c_proj.weight"),
            same(f"{ours}ffn.up_proj.weight", f"{theirs}mlp.c_fc.weight"),
            same(f"{ours}ffn.down_proj.weight", f"{theirs}mlp.c_proj.weight"),
        ]
    return links


def _norms(depth: int, d_model: int, head_dim: int) -> dict[str, Tensor]:
    blocks = {"mixer_norm": d_model, "ffn_norm": d_model, "mixer.q_norm": head_dim, "mixer.k_norm": head_dim}
    found = {f"blocks.{i}.{name}.weight": torch.ones(size) for i in range(depth) for name, size in blocks.items()}
    return found | {"norm.weight": torch.ones(d_model)}

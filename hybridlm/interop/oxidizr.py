"""``hybridlm import-config``: a model file of oxidizr (``model`` and ``trainer`` in YAML) as an experiment of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hybridlm.config.hardware import CPU
from hybridlm.config.load import validate_model
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import Unreadable, read_yaml
from hybridlm.interop.architecture import pattern_text

_DTYPES = {"f32": "32-true", "f16": "16-mixed", "bf16": "bf16-mixed"}
_MAMBA = {
    "mamba2_num_heads": "n_heads",
    "mamba2_head_dim": "head_dim",
    "mamba2_state_size": "d_state",
    "mamba2_chunk_size": "chunk",
    "mamba2_n_groups": "n_groups",
    "mamba2_conv_kernel": "d_conv",
    "mamba2_expand": "expand",
}
_READ = {
    *("name", "hidden_size", "num_layers", "num_heads", "kv_heads", "kv_latent_dim", "q_latent_dim", "d_rope"),
    *("num_experts", "experts_per_tok", "shared_expert_enabled", "intermediate_size", "mamba_layers", *_MAMBA),
    *("mamba3_enabled", "mamba3_complex_rope", "mamba3_mimo_rank", "mamba3_use_conv"),
    *("vocab_size", "max_seq_len", "rope_theta", "dtype"),
}
_TRAINER = {"learning_rate", "max_steps", "batch_size", "gradient_accumulation", "log_interval", "save_interval"}
_TRAINER |= {"target_device", "load_balance_alpha", "max_checkpoints"}


@dataclass(frozen=True)
class Experiment:
    """text: of a file for ``experiments/``. left_out: what has no counterpart, a line each."""

    text: str
    left_out: tuple[str, ...]


def read_oxidizr(path: Path) -> Experiment:
    """UserError, one line: it cannot be read, lacks a field, or describes no model."""
    try:
        content = read_yaml(path)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: expected a mapping with a section model")
    model, trainer = content["model"], content.get("trainer") or {}
    try:
        section = _model(model)
        if "moe" in section and "load_balance_alpha" in trainer:
            section["moe"]["balance_loss_weight"] = trainer["load_balance_alpha"]
        _ = validate_model(section).layers
        tree = {"model": section, **_run(model, trainer)}
        if str(trainer.get("target_device")).lower() == CPU:
            tree = {"defaults": [{"override /hardware": CPU}], **tree}
    except KeyError as error:
        raise UserError(f"{path}: model.{printable(str(error.args[0])[:60])} is missing") from None
    except UserError as error:
        raise UserError([f"{path}: {problem}" for problem in error.problems[:1]]) from None
    except (AttributeError, ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {printable(str(error)[:120])}") from None
    text = "# @package _global_\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return Experiment(text, tuple(_left_out(model, trainer)))


def _model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The model section. A Mamba has no FFN there; latent attention takes the place of attention where it has a
    dimension."""
    width, heads, layers = given["hidden_size"], given["num_heads"], given["num_layers"]
    if layers not in range(1, 1001):
        raise UserError(f"model.num_layers = {layers}: expected 1 to 1000")
    mambas = set(given.get("mamba_layers") or ())
    if wrong := sorted(mambas - set(range(layers))):
        raise UserError(f"model.mamba_layers: {wrong[0]} is not a layer; there are {layers}")
    kind = "mamba3" if given.get("mamba3_enabled") else "mamba2" if given.get("mamba2_num_heads") else "mamba1"
    letter, ffn = ("L" if given.get("kv_latent_dim") else "T"), ("moe" if given.get("num_experts") else "mlp")
    items = [(f"M{kind[-1]}", "none") if i in mambas else (letter, ffn) for i in range(layers)]
    section: dict[str, Any] = {
        "name": str(given.get("name", "oxidizr")),
        "d_model": width,
        "n_layers": layers,
        "pattern": pattern_text(items),
        "vocab_size": given["vocab_size"],
    }
    if mambas and kind != "mamba1":
        section[kind] = {ours: given[theirs] for theirs, ours in _MAMBA.items() if given.get(theirs) is not None}
    if mambas and kind == "mamba3":
        rank, conv = given.get("mamba3_mimo_rank") or None, bool(given.get("mamba3_use_conv"))
        section[kind] |= {"mimo_rank": rank, "use_conv": conv, "complex_rope": bool(given.get("mamba3_complex_rope"))}
    rope = {"rope": True, "rope_theta": given["rope_theta"]}
    if letter == "T":
        section["attention"] = {"n_heads": heads, "n_kv_heads": given.get("kv_heads")} | rope
    else:
        rotated = given.get("d_rope") or 0
        section["mla"] = rope | {
            "n_heads": heads,
            "kv_lora_rank": given["kv_latent_dim"],
            "q_lora_rank": given.get("q_latent_dim"),
            "qk_rope_head_dim": rotated,
            "qk_nope_head_dim": width // heads - rotated,
            "v_head_dim": width // heads,
        }
    hidden = given.get("intermediate_size") or 4 * width
    section["mlp"] = {"d_ff": hidden}
    if ffn == "moe":
        shared = int(bool(given.get("shared_expert_enabled")))
        experts = {"n_experts": given["num_experts"], "top_k": given.get("experts_per_tok") or 1}
        section["moe"] = experts | {"d_expert": hidden, "n_shared_experts": shared}
    return section


def _run(model: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The sections data, optim and trainer, as far as the file sets them."""
    data = {"seq_len": model["max_seq_len"], "tokenizer": {"vocab_size": model["vocab_size"]}}
    sections: dict[str, dict[str, Any]] = {"data": data, "optim": {}, "trainer": {}}
    batch, accumulate = trainer.get("batch_size"), trainer.get("gradient_accumulation", 1)
    if batch:
        data |= {"batch_size": batch, "global_batch": batch * accumulate}
    if trainer.get("max_steps"):  # 0: as many as the epochs take
        sections["trainer"]["max_steps"] = trainer["max_steps"]
    for theirs, section, ours in (
        ("learning_rate", "optim", "lr"),
        ("log_interval", "trainer", "log_every"),
        ("save_interval", "trainer", "ckpt_every"),
        ("max_checkpoints", "trainer", "keep_last"),
    ):
        if trainer.get(theirs):
            sections[section][ours] = trainer[theirs]
    if "dtype" in model:
        sections["trainer"]["precision"] = _DTYPES[str(model["dtype"]).lower()]
    return {name: section for name, section in sections.items() if section}


def _left_out(model: Mapping[str, Any], trainer: Mapping[str, Any]) -> Iterator[str]:
    """A line for each field that nothing here corresponds to."""
    for section, given, read in (("model", model, _READ), ("trainer", trainer, _TRAINER)):
        for field, value in given.items():
            if field not in read and value is not None:
                yield f"{section}.{printable(str(field)[:60])} = {printable(str(value)[:60])}: no counterpart"

"""Folders of transformers models, read as what a stranger may have written: plain JSON and safetensors alone, nothing
outside the folder, nothing executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from hybridlm.config.load import validate_model
from hybridlm.config.model import ModelConfig
from hybridlm.config.pattern import MAX_LAYERS
from hybridlm.errors import UserError, printable
from hybridlm.files.plain import Unreadable, read_json
from hybridlm.files.sealed import MAX_HEADER, header_size
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.architectures import ARCHITECTURES
from hybridlm.interop.remote import RemoteCode
from hybridlm.runs.checkpoint import refuse_unfinite

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_CONFIG = 2**20  # bytes; a thousand layers take 40 kB
# Fields that change nothing that is computed in evaluation, and those that are read under another name.
_HARMLESS = {
    *("_name_or_path", "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map"),
    *("use_cache", "initializer_range", "attention_dropout", "hidden_dropout", "max_position_embeddings"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
    ),
    *("is_encoder_decoder", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("router_aux_loss_coef", "pretraining_tp", "num_logits_to_keep", "rescale_prenorm_residual", "model_max_length"),
    *(
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "time_step_scale",
        "time_step_init_scheme",
        "tokenizer_class",
    ),
    *("chunk_size", "mamba_chunk_size", "use_mamba_kernels", "mamba_ssm_cache_dtype", "use_mambapy", "qk_head_dim"),
    *("use_associative_scan", "z_loss_coefficient", "moe_shared_expert_overlap", "_attn_implementation"),
    *("residual_in_fp32", "max_window_layers", "unk_token_id", "sep_token_id"),
}


@dataclass(frozen=True)
class ForeignModel:
    """What a config.json describes. vocab: the number of ids; context: tokens that it was made for."""

    architecture: Architecture
    section: ModelConfig
    vocab: int
    context: int


def names_an_architecture(folder: Path) -> bool:
    """Whether its config.json is one of transformers. UserError: it cannot be read."""
    return (folder / "config.json").exists() and not _config(folder / "config.json").keys().isdisjoint(
        ("architectures", "model_type")
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path, _MAX_CONFIG, unique=True)
    except Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object")
    return config


def read_config(folder: Path) -> ForeignModel:
    """The model that a folder's config.json describes. UserError: one line that names what has no counterpart here."""
    path = folder / "config.json"
    config = _config(path)
    architecture = _architecture(config, path)
    fields = {**architecture.defaults, **_flat(config, path)}
    layers = fields.get("num_hidden_layers", 1)
    try:
        if type(layers) is not int or not 1 <= layers <= 2 * MAX_LAYERS:  # a mixer and its FFN may be two
            raise UserError(f"num_hidden_layers = {printable(str(layers)[:40])}: not a number of layers")
        fields = architecture.normal(fields)
        section = architecture.read(fields)
        vocab = fields["vocab_size"]
        if not isinstance(vocab, int) or not 2 <= vocab < 2**31:
            raise UserError(f"vocab_size = {printable(str(vocab)[:40])}: not a number of ids")
        model = validate_model(section | {"vocab_multiple": 1, "name": architecture.model_type})
        written = architecture.config(model, vocab)
    except KeyError as error:
        raise UserError(f"{path}: it lacks {printable(str(error.args[0])[:80])}") from None
    except UserError as error:
        raise UserError([f"{path}: {problem}" for problem in error.problems[:1]]) from None
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: {printable((str(error).splitlines() or ['not such a configuration'])[0][:120])}"
        ) from None
    _refuse_differences(architecture, fields, written, path)
    context = fields.get("max_position_embeddings")
    return ForeignModel(
        architecture, model, vocab, context if isinstance(context, int) and 2 <= context < 2**20 else 2048
    )


def _architecture(config: Mapping[str, Any], path: Path) -> Architecture:
    names, model_type = config.get("architectures"), config.get("model_type")
    name = names[0] if isinstance(names, list) and names else None
    for architecture in (*ARCHITECTURES, RemoteCode()):
        if name == architecture.name or (name is None and model_type == architecture.model_type):
            return architecture
    legal = ", ".join(one.name for one in ARCHITECTURES)
    raise UserError(f"{path}: {printable(str(name or model_type)[:60])} cannot be read; expected one of {legal}")


def _flat(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields, with those of rotary positions, which newer versions nest, at the top."""
    fields = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path}: rope_parameters: scaled rotary positions have no counterpart here")
    limit = fields.get("time_step_limit")
    if isinstance(limit, list) and limit[:1] == [0.0] and limit[1:] in ([{"__float__": "Infinity"}], [float("inf")]):
        del fields["time_step_limit"]
    known = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    return fields | {ours: rope[theirs] for theirs, ours in known.items() if theirs in rope}


def _refuse_differences(
    architecture: Architecture, fields: Mapping[str, Any], written: Mapping[str, Any], path: Path
) -> None:
    """UserError: a field says something that our model section does not: exported again it would be another."""
    for field, value in fields.items():
        if field in _HARMLESS or field in architecture.ignored:
            continue
        if field in written:
            same = _same(value, written[field])
        else:
            same = not value or value == architecture.defaults.get(field)
        if not same:
            raise UserError(f"{path}: {printable(field[:60])} = {printable(str(value)[:60])}: has no counterpart here")


def _same(value: Any, expected: Any) -> bool:
    """A mapping may lack what was not yet written: then it means what was computed before."""
    if isinstance(value, dict) and isinstance(expected, dict):
        return all(key in expected and _same(item, expected[key]) for key, item in value.items())
    numbers = isinstance(value, float) and isinstance(expected, float | int)
    return bool(value == expected or (numbers and abs(value - expected) <= 1e-12 * abs(value)))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, memory-mapped. UserError: a file is missing, damaged or elsewhere, a name occurs twice,
    the index says something else than the files, or a tensor holds numbers that are not finite."""
    tensors: dict[str, Tensor] = {}
    for path, indexed in _shards(folder).items():
        try:
            if header_size(path) > MAX_HEADER:
                raise Unreadable(f"its header is larger than {MAX_HEADER:,} bytes")
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        except Exception as error:  # the library raises several kinds for what it cannot read
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UserError(f"{path}: damaged, or not safetensors ({printable(reason)})") from None
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{path}: {printable(twice[0][:100])} is also in another file")
        if indexed is not None and (wrong := sorted(indexed ^ found.keys())):
            raise UserError(f"{path}: the index and the file differ about {printable(wrong[0][:100])}")
        tensors |= found
    refuse_unfinite(tensors, folder)
    return tensors


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files, each with the tensors that the index says are in it; None: there is no index."""
    index = folder / _INDEX
    if not index.exists():
        single = folder / _SINGLE
        if not single.exists():
            pickles = [path.name for path in folder.glob("*.bin")] + [path.name for path in folder.glob("*.pt")]
            which = f" ({pickles[0]} is a pickle, which may hold code; convert it with transformers)" if pickles else ""
            raise UserError(f"{folder}: has no {_SINGLE}{which}")
        return {single: None}
    try:
        content = read_json(index, unique=True)
    except Unreadable as error:
        raise UserError(f"{index}: {error}") from None
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: expected a weight_map from tensors to files")
    shards: dict[Path, set[str] | None] = {}
    present = {path.name for path in folder.iterdir()}
    for name, tensors in groupby(sorted(names, key=lambda tensor: names[tensor]), lambda tensor: names[tensor]):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {printable(name[:100])} is not the name of a safetensors file in this folder")
        if name not in present:
            raise UserError(f"{index}: {printable(name[:100])} is missing")
        shards[folder / name] = set(tensors)
    return shards

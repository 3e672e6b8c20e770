"""``hybridlm export``: a trained run as a folder that other programs read, checked before it gets its name."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hybridlm.config.load import from_yaml, to_yaml
from hybridlm.config.model import ModelConfig
from hybridlm.data.chat import template_of
from hybridlm.errors import UserError
from hybridlm.files.plain import read_text, read_yaml
from hybridlm.files.sealed import write_sealed
from hybridlm.interop.architecture import Architecture
from hybridlm.interop.architectures import ARCHITECTURES
from hybridlm.interop.card import card
from hybridlm.interop.links import exported
from hybridlm.interop.reach import nearest
from hybridlm.interop.reference import Agreement, check, write_reference
from hybridlm.interop.remote import RemoteCode
from hybridlm.interop.writing import new_folder, write_json
from hybridlm.model.lm import HybridLM
from hybridlm.runs.checkpoint import KEY, LoadedRun, facts
from hybridlm.runs.run_folder import RunFolder

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_ROWS = ("embedding.weight", "lm_head.weight")  # cut to the ids that exist


@dataclass(frozen=True)
class Exported:
    """An exported folder or file. readers: the programs that read it. agreement: with the first of them; None: not
    loaded there. notes: what a user of it has to know, a line each."""

    folder: Path
    name: str
    readers: tuple[str, ...]
    agreement: Agreement | None
    notes: tuple[str, ...] = ()


def choose(model: ModelConfig, name: str | None = None) -> Architecture:
    """The first architecture that represents ``model`` exactly, or the one called ``name``. UserError: there is none;
    one line for each constraint of the nearest, or of that one, with the override that lifts it."""
    candidates = [one for one in ARCHITECTURES if name is None or name in (one.name, one.model_type)]
    if not candidates:
        legal = ", ".join(one.model_type for one in ARCHITECTURES)
        raise UserError(f"--arch {name}: expected one of {legal}")
    architecture, needs = nearest(model, candidates)
    if not needs:
        return architecture
    refusal = "no architecture of transformers computes what this model does (--to hf-code takes it)"
    raise UserError([f"{refusal}; nearest: {architecture.name}", *(need.line() for need in needs)])


def export_hf(run: LoadedRun, target: Path, *, arch: str | None = None, dtype: str | None = None) -> Exported:
    """Writes the folder ``target`` for transformers; the run's model is rounded to ``dtype`` where that is given.
    UserError: nothing represents the model, or ``target`` is there already. RunFailed: the check after writing found a
    difference; nothing is left behind."""
    return _export(run, target, choose(run.model.config, arch), dtype)


def export_code(run: LoadedRun, target: Path, *, dtype: str | None = None) -> Exported:
    """The same for any model, with its code in the folder."""
    return _export(run, target, RemoteCode(), dtype)


def _export(run: LoadedRun, target: Path, architecture: Architecture, dtype: str | None) -> Exported:
    model = run.model
    readers = ("transformers", *architecture.readers)
    if dtype is not None:
        model.round_parameters(DTYPES[dtype])
    with new_folder(target) as folder, tempfile.TemporaryDirectory() as scratch:
        theirs = exported(architecture.links(model.config), weights_of(model))
        save_file(theirs, folder / "model.safetensors", {"format": "pt"})
        config = architecture.config(model.config, model.vocab_size)
        write_json(folder / "config.json", config | common_config(run, architecture))
        files = architecture.files(model.config)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_tokenizer(run, folder)
        write_json(folder / "generation_config.json", {"eos_token_id": run.tokenizer.eos_id, "do_sample": True})
        text = card(run, architecture.name, readers, context_of(run), remote=bool(files))
        (folder / "README.md").write_text(text, encoding="utf-8")
        reference = Path(scratch, "reference.safetensors")
        write_reference(reference, model.float(), run.tokenizer, architecture.layer_ends(model.config))
        agreement = check(folder, reference, architecture.name)
    return Exported(target, architecture.name, readers, agreement)


def weights_of(model: HybridLM) -> dict[str, Tensor]:
    """The model's tensors, without the rows of ids that do not exist."""
    weights = model.state_dict()
    return {name: tensor[: model.vocab_size] if name in _ROWS else tensor for name, tensor in weights.items()}


def common_config(run: LoadedRun, architecture: Architecture) -> dict[str, Any]:
    """What every config.json holds."""
    dtype = run.model.embedding.weight.dtype
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": run.tokenizer.eos_id,  # documents begin with it in training
        "eos_token_id": run.tokenizer.eos_id,
        "pad_token_id": None,
        "max_position_embeddings": context_of(run),
    }


def context_of(run: LoadedRun) -> int:
    """Tokens of a training window."""
    recorded = read_yaml(run.folder.config)
    length = recorded.get("data", {}).get("seq_len") if isinstance(recorded, dict) else None
    return length if isinstance(length, int) else 2048


def write_tokenizer(run: LoadedRun, folder: Path) -> None:
    """The tokenizer as transformers reads it, with the chat template of a run that has one."""
    run.tokenizer.save(folder / "tokenizer.json")
    eos = run.tokenizer.special_name(run.tokenizer.eos_id)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "bos_token": eos,
            "pad_token": eos,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_of(run),
        },
    )
    if run.folder.chat_template.is_file():
        template_of(run.tokenizer).save(folder)


def export_safetensors(run: LoadedRun, target: Path, *, dtype: str | None = None) -> Exported:
    """Writes the folder ``target``: weights, config.yaml and tokenizer, a run folder that holds nothing else."""
    if dtype is not None:
        run.model.round_parameters(DTYPES[dtype])
    with new_folder(target) as path:
        folder = RunFolder(path)
        config = from_yaml(read_text(run.folder.config), rules=False)
        folder.config.write_text(to_yaml(config), encoding="utf-8")
        run.tokenizer.save(folder.tokenizer)
        if run.folder.chat_template.is_file():
            template_of(run.tokenizer).save(path)
        model = run.model
        ours = facts(model.config, model.vocab_size, run.tokenizer.fingerprint, accumulate=1) | {"step": run.step}
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        write_sealed(folder.weights, KEY, ours, weights)
    return Exported(target, "safetensors", ("hybridlm",), None)

"""A ``State`` in a file: to go on later, in another process, where it was left off.

A safetensors file with every tensor of the cache, the columns of attention cut to the tokens that are there: of a model of Mambas alone
its size does not grow with the text. Its metadata is JSON and holds the fingerprint of the model, since a state means something to the
weights that made it only, and a checksum. No code runs when it is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridlm.errors import UserError
from hybridlm.files.sealed import digest, read_sealed, write_sealed
from hybridlm.generate.engine import State

if TYPE_CHECKING:
    from hybridlm.model.lm import HybridLM

FORMAT_VERSION = 1
KEY = "hybridlm_state"  # of our JSON among the file's metadata
_LOGITS, _TOKENS = "logits", "tokens"


def fingerprint(model: HybridLM) -> str:
    """SHA-256 (hex) over the architecture and every weight. It reads all of them: half a second for a gigabyte or so."""
    facts = json.dumps([model.config.model_dump(mode="json"), model.vocab_size], sort_keys=True)
    return digest(facts, model.state_dict())


def save_state(path: Path, state: State, model: HybridLM, note: str = "") -> None:
    """Writes the rows of ``state``; a crash leaves the old file or the new one. note: what the caller wants back. ConfigError: the file
    cannot be written."""
    past = state.cache.past
    tensors = {name: tensor[:, :past] if _grows(state, name) else tensor for name, tensor in state.cache.state_dict().items()}
    if state.logits is not None:
        tensors[_LOGITS] = state.logits
    tensors[_TOKENS] = torch.tensor([token for row in state.ids for token in row], dtype=torch.long)
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    facts = {
        "format_version": FORMAT_VERSION,
        "model": fingerprint(model),
        "rows": [len(row) for row in state.ids],
        "room": state.room,
        "note": note,
    }
    try:
        write_sealed(path, KEY, facts, tensors)
    except OSError as error:
        raise UserError(f"{path}: the state cannot be written ({str(error).splitlines()[0][:120]})") from None


def _grows(state: State, name: str) -> bool:
    """Whether this tensor of the cache has a column for every token."""
    layer, _, rest = name.removeprefix("layers.").partition(".")
    return bool(rest) and state.cache.layers[int(layer)].has_columns


def load_state(path: Path, model: HybridLM) -> tuple[State, str]:
    """The inverse of ``save_state``: the rows, and the note. Going on with them is bit for bit what it would have been.

    ConfigError: missing, damaged, not a state, from another format version, or of another model.
    """
    facts, tensors = _read(path)
    if facts["model"] != fingerprint(model):
        raise UserError(f"{path}: a state of another model; a state fits the weights that made it and no others")
    tokens = tensors.pop(_TOKENS).tolist()
    logits = tensors.pop(_LOGITS, None)
    ids, first = [], 0
    for length in facts["rows"]:
        ids.append(tokens[first : first + length])
        first += length
    cache = model.new_cache(len(ids), facts["room"])
    empty = cache.state_dict()
    for name, tensor in tensors.items():
        if name in empty and tensor.shape != empty[name].shape:
            whole = torch.zeros_like(empty[name])
            whole[:, : tensor.shape[1]] = tensor
            tensors[name] = whole
    cache.load_state_dict(tensors)
    device = model.embedding.weight.device
    return State(ids, cache, None if logits is None else logits.to(device), facts["room"]), facts["note"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a state that generate --save-state or /save of chat wrote")
    return read_sealed(path, KEY, FORMAT_VERSION, "a state")

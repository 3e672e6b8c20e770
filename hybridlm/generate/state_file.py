"""A ``State`` in a file, to continue later or in another process.

A safetensors file with every tensor of the cache, attention's columns cut to the tokens present: for a model of Mamba
layers only, its size does not grow with the text. The metadata is JSON with the fingerprint of the model, since a state
is valid only with the weights that made it, and a checksum. No code runs when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from hybridlm.config.problems import recorded
from hybridlm.config.section import Section
from hybridlm.errors import UserError, printable
from hybridlm.files.sealed import digest, read_sealed, write_sealed
from hybridlm.generate.engine import ROOM_AHEAD, State
from hybridlm.model.block import Block
from hybridlm.model.cache import ModelCache
from hybridlm.model.lm import HybridLM

FORMAT_VERSION = 1
KEY = "hybridlm_state"  # of the JSON in the file's metadata
_LOGITS, _TOKENS = "logits", "tokens"
_DOCUMENTS = "last_doc"  # of a cache that distinguishes documents


class StateFacts(Section):
    """rows: tokens of each row; room: tokens per row that the state had memory for."""

    format_version: Literal[1]
    model: str  # the fingerprint
    rows: list[Annotated[int, Field(ge=1, lt=2**31)]] = Field(min_length=1)
    room: int = Field(ge=1, lt=2**31)
    note: str


def fingerprint(model: HybridLM) -> str:
    """SHA-256 (hex) over the architecture and all weights; about half a second per gigabyte."""
    facts = json.dumps([model.config.model_dump(mode="json"), model.vocab_size], sort_keys=True)
    return digest(facts, model.state_dict())


def save_state(path: Path, state: State, model: HybridLM, note: str = "") -> None:
    """Writes the rows of ``state``; a crash leaves the old file or the new one. note: returned by ``load_state``.
    UserError: the file cannot be written."""
    past = state.cache.past
    tensors = {
        name: tensor[:, :past] if _grows(state.cache, name) else tensor
        for name, tensor in state.cache.state_dict().items()
    }
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
        raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0][:120]})") from None


def _grows(cache: ModelCache, name: str) -> bool:
    """Whether this tensor of the cache has a column per token."""
    layer, _, rest = name.removeprefix("layers.").partition(".")
    return bool(rest) and cache.layers[int(layer)].has_columns


def load_state(path: Path, model: HybridLM) -> tuple[State, str]:
    """The inverse of ``save_state``: the rows, and the note. Continuing them gives bit for bit what it would have.

    UserError: missing, damaged, not a state, from another format version, of another model, or not a possible state of
    this one.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one written by generate --save-state or by /save in chat")
    content, tensors = read_sealed(path, KEY, FORMAT_VERSION, "a state")
    facts = recorded(StateFacts, content, path)
    if facts.model != fingerprint(model):
        raise UserError(f"{path}: a state of another model; a state is valid only with the weights that made it")
    try:
        tokens, logits = tensors.pop(_TOKENS), tensors.pop(_LOGITS, None)
        # Before anything is made in the size that the rows claim.
        if (
            (tokens.shape, tokens.dtype) != ((sum(facts.rows),), torch.long)
            or int(tokens.min()) < 0
            or int(tokens.max()) >= model.vocab_size
        ):
            raise ValueError("its tokens do not match its rows")
        if logits is not None and (
            logits.shape != (len(facts.rows), model.vocab_size) or not logits.is_floating_point()
        ):
            raise ValueError(f"logits have shape {tuple(logits.shape)} and are {logits.dtype}")
        room = _room(facts, logits is None, model)
        _refuse_misfits(tensors, facts.rows, logits is None, model.new_cache(len(facts.rows), room, device="meta"))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a state of this model ({error})") from None
    ids = [row.tolist() for row in tokens.split(facts.rows)]
    cache = model.new_cache(len(ids), room)
    for name, empty in cache.state_dict().items():
        if _grows(cache, name):
            past = tensors[name]
            tensors[name] = torch.zeros_like(empty)
            tensors[name][:, : past.shape[1]] = past
    cache.load_state_dict(tensors)
    device = model.embedding.weight.device
    return State(ids, cache, None if logits is None else logits.to(device), room), facts.note


def _room(facts: StateFacts, unread: bool, model: HybridLM) -> int:
    """The room to allocate: no more than the text and a continuation need, so that a file cannot claim arbitrary
    memory, but enough for a window that the file's room includes, since such a cache is bounded."""
    needed = max(facts.rows) - unread
    specs = [cast(Block, block).mixer.spec for block in model.blocks]
    windows = [window for spec in specs if isinstance(window := getattr(spec, "window", None), int)]
    return max(needed, min(facts.room, max([needed + ROOM_AHEAD, *(n for n in windows if n <= facts.room)])))


def _refuse_misfits(tensors: Mapping[str, Tensor], rows: Sequence[int], unread: bool, empty: ModelCache) -> None:
    """empty: the cache that the tensors are for, on "meta". Raises ValueError."""
    lengths = [row - unread for row in rows]
    # Columns are cut to the tokens present.
    expected = {
        name: ((tensor[:, : max(lengths)] if _grows(empty, name) else tensor).shape, tensor.dtype)
        for name, tensor in empty.state_dict().items()
    }
    if _DOCUMENTS in tensors:
        expected[_DOCUMENTS] = expected["lengths"]
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{'lacks' if wrong[0] in expected else 'unknown'} {printable(wrong[0])}")
    for name, (shape, dtype) in expected.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (shape, dtype):
            raise ValueError(
                f"{name} has shape {tuple(found.shape)} and is {found.dtype}, not {tuple(shape)} and {dtype}"
            )
    if tensors["lengths"].tolist() != lengths:
        raise ValueError("lengths do not match its rows")
    positions = tensors["next_position"].tolist()
    if not all(0 <= position <= length for position, length in zip(positions, lengths, strict=True)):
        raise ValueError("next_position is beyond its row")

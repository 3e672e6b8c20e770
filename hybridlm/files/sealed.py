"""Safetensors files whose metadata holds facts of ours and a checksum over everything: weights, states. No code runs
when one is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridlm.errors import UserError, printable
from hybridlm.files.durable import replaced
from hybridlm.files.plain import Unreadable, open_regular, parse_json

MAX_HEADER = 2**24  # bytes; a model of a thousand layers has 2 MB


def write_sealed(path: Path, key: str, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """A crash leaves the old file or the new one. key: where the facts, as JSON, stand in the metadata. OSError: it
    cannot be written."""
    text = json.dumps(facts)
    try:
        with replaced(path) as partial:
            save_file(tensors, partial, {key: text, "sha256": digest(text, tensors)})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def read_sealed(path: Path, key: str, version: int, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts and the tensors of ``write_sealed``. what: what the file should hold, in words.

    UserError: damaged, none of ours, or its ``format_version`` is another than ``version``.
    """
    try:
        if (size := header_size(path)) > MAX_HEADER:
            raise Unreadable(f"a header of {size:,} bytes; at most {MAX_HEADER:,} are read")
        with safe_open(path, framework="pt") as archive:
            metadata = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118, it is not a dict
    except Exception as error:  # the library raises several kinds for what it cannot read
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path}: damaged, or not {what} ({reason})") from None
    if key not in metadata:
        raise UserError(f"{path}: not {what} (its metadata has no '{key}')")
    if metadata.get("sha256") != digest(metadata[key], tensors):
        raise UserError(f"{path}: damaged: its bytes do not match their checksum")
    try:
        facts = parse_json(metadata[key])
    except Unreadable as error:
        raise UserError(f"{path}: its metadata is {error}") from None
    if not isinstance(facts, dict) or facts.get("format_version") != version:
        found = facts.get("format_version") if isinstance(facts, dict) else None
        raise UserError(f"{path}: format version {printable(str(found)[:40])}, this program reads {version}")
    return facts, tensors


def header_size(path: Path) -> int:
    """Bytes of the header of a safetensors file, of which the library reads up to 100 MB, in many times that of memory.
    Raises Unreadable."""
    with open_regular(path) as file:
        return int.from_bytes(file.read(8), "little")


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over a text and every byte of named tensors."""
    sha = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()

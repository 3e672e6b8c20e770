"""The training and validation windows of a prepared corpus."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from hybridlm.config.data import DataConfig
from hybridlm.data.corpus import Part, Prepared
from hybridlm.data.synthetic.source import GeneratedWindows
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.data.windows.pairs import PairWindows
from hybridlm.data.windows.window_sources import CutWindows, Mixture, PackedWindows, SideBySide, Source, Windows
from hybridlm.errors import ConfigError, UserError


class Packed(NamedTuple):
    """windows: of whole documents, over all parts; efficiency: the share of their columns that hold a pair, 1 meaning
    no padding."""

    windows: int
    efficiency: float


def train_source(prepared: Prepared, config: DataConfig, seed: int) -> Source:
    """The training windows, cut or packed as in ``config``. UserError: a part is too short for a window, or has no
    document to pack."""
    if config.source == "synthetic":
        return GeneratedWindows(config.synthetic, "train", config.seq_len, seed)

    if config.format == "preferences":
        return PairWindows(prepared.parts[0].train, config.seq_len, seed)

    def source_of(part: Part, its_seed: int) -> Source:
        if config.packing:
            return PackedWindows(_packed(prepared, part, "train", config.seq_len), its_seed, isolate=config.isolate)
        return CutWindows(part.train.stream, config.seq_len, its_seed)

    if len(prepared.parts) == 1:
        return source_of(prepared.parts[0], seed)
    sources = []
    for part in prepared.parts:
        # By its name, so that parts of equal size are not read in step and a part's order is independent of the others.
        its_seed = int.from_bytes(hashlib.sha256(f"{seed}/{part.name}".encode()).digest()[:8], "little")
        try:
            sources.append(source_of(part, its_seed))
        except UserError as error:
            raise ConfigError(f"data.parts.{part.name}: {error}") from None
    return Mixture(sources, [part.weight for part in prepared.parts], seed)


def val_windows(prepared: Prepared, config: DataConfig) -> list[Windows]:
    """The validation windows of all parts, one part after the other. UserError: a part has nothing to predict."""
    seq_len, found = config.val_seq_len or config.seq_len, list[Windows]()
    if config.format == "preferences":
        return [PairWindows(prepared.parts[0].val, seq_len, 0)]
    for part in prepared.parts:
        try:
            if config.packing:
                found.append(PackedWindows(_packed(prepared, part, "val", seq_len), 0, isolate=config.isolate))
            else:
                found.append(SideBySide(part.val.stream, seq_len))
        except UserError as error:
            raise ConfigError(f"data.parts.{part.name}: {error}" if len(prepared.parts) > 1 else str(error)) from None
    return found


def packed_documents(prepared: Prepared, seq_len: int) -> Packed:
    """How the training documents fill windows of ``seq_len`` columns. UserError: a part has none."""
    packed = [_packed(prepared, part, "train", seq_len) for part in prepared.parts]
    windows = sum(len(one) for one in packed)
    return Packed(windows, sum(len(one) * one.efficiency for one in packed) / windows)


def _packed(prepared: Prepared, part: Part, split: str, seq_len: int) -> PackedStream:
    text = part.train if split == "train" else part.val
    folder = part.folder / f"{split}-packed-{seq_len}"
    return PackedStream(text.stream, seq_len, eos_id=prepared.tokenizer.eos_id, folder=folder)

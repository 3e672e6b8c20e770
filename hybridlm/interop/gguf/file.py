"""A GGUF file: written with the package ``gguf``, then read back and compared number by number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType
from torch import Tensor

from hybridlm.errors import RunFailed

DTYPES = ("f32", "f16", "bf16", "q8_0")
_TYPES = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16}
_TYPES["q8_0"] = GGMLQuantizationType.Q8_0
_FILE_TYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
_FILE_TYPES["q8_0"] = LlamaFileType.MOSTLY_Q8_0
_BLOCK = 32  # numbers of a row that share a scale in q8_0
# Small ones that llama.cpp's operators take in f32 only, or that would cost the most to round.
_PRECISE = ("norm.weight", "ssm_conv1d.weight", "ssm_a", "ssm_d", "ffn_gate_inp.weight")
# Largest error of a number: relative to it, and in q8_0 to the largest of its block.
_ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-11}
_TINY = 2.0**-25  # half the smallest number of f16


def types_of(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, GGMLQuantizationType]:
    """How each tensor is stored: f32 where it is small, f16 where it cannot be cut into blocks, else ``dtype``."""
    types = {}
    for name, tensor in tensors.items():
        precise = tensor.ndim < 2 or name.endswith(_PRECISE)
        blocks = dtype != "q8_0" or tensor.shape[-1] % _BLOCK == 0
        types[name] = _TYPES["f32" if precise else dtype if blocks else "f16"]
    return types


def write(path: Path, arch: str, keys: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Writes ``path``. keys: besides those of the format, each a str, bool, int, float, or list of one of these.
    RunFailed: read back, it does not hold what it should."""
    writer, types = gguf.GGUFWriter(path, arch), types_of(tensors, dtype)
    for key, value in keys.items():
        writer.add_key_value(key, value, _type_of(value))
    writer.add_file_type(_FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        stored = gguf.quantize(tensor.float().numpy(), types[name])
        writer.add_tensor(name, stored, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare(path, keys, tensors)


def _type_of(value: object) -> GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        return GGUFValueType.UINT32
    return GGUFValueType.get_type(value)


def _compare(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    reader = gguf.GGUFReader(path)
    for key, value in keys.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        if found != (float(np.float32(value)) if isinstance(value, float) else value):
            raise RunFailed(f"the written file has {key} = {str(found)[:80]} instead of {str(value)[:80]}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if stored.keys() != tensors.keys():
        raise RunFailed(f"the written file has other tensors: {sorted(stored.keys() ^ tensors.keys())}")
    for name, wanted in tensors.items():
        kind = stored[name].tensor_type
        found = torch.from_numpy(gguf.dequantize(stored[name].data, kind).copy()).view(wanted.shape)
        expected = wanted.float()
        size = expected.abs()
        if kind is GGMLQuantizationType.Q8_0:
            size = size.unflatten(-1, (-1, _BLOCK)).amax(-1).repeat_interleave(_BLOCK, -1)
        limit = _ROUNDING[kind.name] * size + (_TINY if kind.name != "F32" else 0)
        if not bool(((found - expected).abs() <= limit).all()):  # also where one of them is not a number
            raise RunFailed(f"the written file's {name}, in {kind.name}, is not what it should be")

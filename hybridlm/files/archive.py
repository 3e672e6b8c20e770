"""Untrusted archives of torch.save: plain values, and tensors whose data is in the file. Reading one runs no code.

Reading takes memory in proportion to the file: nothing in it is compressed, the pickle is small, and a tensor that
claims more than its bytes (sparse, on "meta", expanded, one storage under many names) is refused before it is copied.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from hybridlm.files.plain import MAX_DEPTH, Unreadable, open_regular

MAX_PICKLE = 2**24  # bytes without the tensors; a model of a thousand layers has 7 MB
_VISITS = 4  # maximum values per byte of the pickle; a shared one counts each time


def read_archive(path: Path, *, shared: bool = False) -> object:
    """Mappings with keys of text and numbers, lists, tuples, texts, numbers, true, false, None, and memory-mapped
    tensors on the CPU, whole and in order. shared: one storage may have several names, as tied weights have, and its
    bytes count once: for a reader that copies named tensors only. Raises Unreadable."""
    size, pickled = _sizes(path)
    try:
        content = torch.load(path, map_location=lambda storage, place: storage, weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise Unreadable(
            "refused, the file holds more than tensors and plain values (loading it could run code)"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever the functions raise that rebuild its tensors
        raise Unreadable(
            f"not an archive of torch ({(str(error).splitlines() or [type(error).__name__])[0][:120]})"
        ) from None
    _refuse_unplain(content, size, _VISITS * pickled, shared=shared)
    return content


def _sizes(path: Path) -> tuple[int, int]:
    """Bytes of the file, and of the pickle in it."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        try:
            members = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile raises several kinds
            raise Unreadable(f"not an archive of torch ({error})") from None
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or sum(member.file_size for member in members) > size:
        raise Unreadable("refused, its parts are compressed or overlap")
    pickled = sum(member.file_size for member in members if member.filename.endswith("/data.pkl"))
    if pickled > MAX_PICKLE:
        raise Unreadable(f"refused, it has {pickled:,} bytes besides its tensors; the limit is {MAX_PICKLE:,}")
    return size, pickled


def _refuse_unplain(content: object, size: int, visits: int, *, shared: bool) -> None:
    held: dict[int, int] = {}  # bytes of each tensor, or storage
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        visits -= len(level)
        if visits < 0:
            raise Unreadable("refused, it repeats one value too often")
        level = [item for value in level for item in _inside(value, held, shared)]
        if not level:
            break
    else:
        raise Unreadable(f"refused, it is more than {MAX_DEPTH} levels deep")
    if sum(held.values()) > size:
        raise Unreadable("refused, its tensors claim more bytes than the file has")


def _inside(value: object, held: dict[int, int], shared: bool) -> Collection[object]:
    """The values in a mapping, list or tuple. ``held`` gets the bytes of a tensor. Raises Unreadable: not plain."""
    if isinstance(value, Tensor):
        size = _tensor_bytes(value)
        held[value.untyped_storage().data_ptr() if shared else id(value)] = size
    elif isinstance(value, dict) and type(value) in (dict, OrderedDict):
        if any(type(key) not in (str, int) for key in value):
            raise Unreadable("refused, a key is neither text nor a number")
        return value.values()
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        return value
    elif type(value) not in (type(None), bool, int, float, str):
        raise Unreadable(f"refused, it contains a {type(value).__name__}")
    elif type(value) is int and value.bit_length() > 63:
        raise Unreadable("refused, a whole number of more than 64 bits")
    return ()


def _tensor_bytes(tensor: Tensor) -> int:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_nested
    virtual = plain and (tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    if not plain or virtual or not tensor.is_contiguous():
        raise Unreadable(
            "refused, a tensor that is not plain (sparse, without its numbers, quantized, expanded, or a view)"
        )
    if tensor.__dict__ or tensor._backward_hooks:
        raise Unreadable("refused, a tensor with attributes")
    return tensor.nbytes

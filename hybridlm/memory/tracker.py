"""Counts the bytes of live tensors while a piece of training runs on fake tensors, which have shapes but no data.

torch's fake mode knows a custom operator only by its declared outputs, so it does not see the workspace inside. Here
the operator's own Python runs on "meta" tensors instead. An operator that loops over chunks of the sequence runs on
short sequences, from which its workspace is extrapolated. Where a step reads data, an assumption answers:

* experts get equal shares of the tokens;
* with packed documents, one token in ``_YOUNG`` is at the beginning of its document;
* any other number that a step reads (the gradient norm, before clipping) is 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA_GRAIN = 512  # bytes: torch's allocator for CUDA rounds up to it (c10/cuda/CUDACachingAllocator.h, kMinBlockSize)
_YOUNG = 32
# Positions of the arguments ``order`` and ``offsets``.
_EXPERTS = {"hybridlm::experts": (2, 3), "hybridlm::experts_backward": (3, 4)}
# Operators that loop over chunks of the sequence: the position of the argument that is the length of a chunk, and for
# each argument the axis along which its tokens or chunks are. Any other operator runs on the whole sequence.
_LOOPS: dict[str, tuple[int, tuple[int | None, ...]]] = {
    "hybridlm::linear_cross_entropy": (6, (0, None, 0)),
    "hybridlm::selective_scan": (8, (1, 1, None, 1, 1, None, None, 1)),
    "hybridlm::selective_scan_backward": (10, (1, 1, 1, 1, None, 1, 1, None, 1, 1)),
    "hybridlm::mimo_scan": (14, (1, 1, 1, 1, 1, 1, None, None, 3, None, None, None, 1)),
    "hybridlm::mimo_scan_backward": (16, (1, 1, 1, 1, 1, 1, 1, 1, None, None, 3, None, None, 1, 1)),
    "hybridlm::gated_delta": (7, (1, 1, 1, 1, 1, None, 1)),
    "hybridlm::gated_delta_backward": (9, (1, None, 1, 1, 1, 1, 1, 1, 0)),
}
_FIRST = 1024  # tokens that a loop runs on first
# The workspaces measured so far, by all that they depend on; shared by the plans of a process.
_WORKSPACES: dict[tuple[object, ...], int] = {}


class MemoryTracker(TorchDispatchMode):
    """Inside it, ``held`` is the bytes of all live tensors that were created since it was entered, ``peak`` the most
    that this was, ``levels`` what it was after each operation. grain: the allocator rounds sizes up to a multiple of
    it."""

    def __init__(self, grain: int = 1) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.levels: list[int] = []
        self._grain = grain
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> int:
        """Begins a new peak; returns the one so far."""
        before, self.peak = self.peak, self.held
        return before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (written := _written(func)) is not None:
            return args[written] if isinstance(written, int) else (kwargs or {})[written]
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return _number(args[0])
        if func is torch.ops.aten.nonzero.default:
            found = args[0].new_empty((max(1, args[0].numel() // _YOUNG), args[0].dim()), dtype=torch.int64)
            self.hold(found)
            return found
        workspace = self._workspace(func._schema.name, args) if func.namespace == "hybridlm" else 0
        before = self.held
        with torch._C.DisableTorchFunction():
            out = func(*args, **(kwargs or {}))
        self.hold(out)
        self.peak = max(self.peak, before + workspace)
        return out

    def hold(self, made: object) -> None:
        """Counts the storages of ``made`` (a tensor, or a nest of them) that are new, until they are freed."""
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage, -(-storage.nbytes() // self._grain) * self._grain)
        self.peak = max(self.peak, self.held)
        self.levels.append(self.held)

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata

        def forget(_: object) -> None:
            del self._known[key]
            self.held -= size

        self._known[key] = weakref.ref(storage, forget)
        self.held += size

    def _workspace(self, name: str, args: Sequence[Any]) -> int:
        """The most bytes that a custom operator of ours holds, its results included."""
        key = (self._grain, name, *[_shape(argument) for argument in tree_leaves(args)])
        if key not in _WORKSPACES:
            with _disable_current_modes():
                measure = _extrapolated if name in _LOOPS else _run
                _WORKSPACES[key] = max(measure(name, args, self._grain))
        return _WORKSPACES[key]


def _run(name: str, args: Sequence[Any], grain: int) -> list[int]:
    """Bytes that an operator holds after each of its operations, on tensors of the same shapes without data, these not
    counted."""
    tracker = MemoryTracker(grain)

    def plain(argument: object) -> object:
        if not isinstance(argument, Tensor):
            return argument
        tensor = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")
        tracker._add(tensor.untyped_storage(), 0)
        return tensor

    plain_args = tree_map(plain, list(args))
    if name in _EXPERTS:
        order, offsets = _EXPERTS[name]
        pairs, experts = args[order].shape[0], args[offsets].shape[0]
        plain_args[offsets] = torch.tensor([pairs * (i + 1) // experts for i in range(experts)])
    with tracker:
        made = OPDEFS[name]._init_fn(*plain_args)
    del made
    return tracker.levels


def _extrapolated(name: str, args: Sequence[Any], grain: int) -> list[int]:
    """``_run`` of an operator that loops over the sequence. It runs on twice as many chunks each time until its
    operations have grown by half twice: from then on more chunks only add rounds of its loop, all alike. What it holds
    after an operation, counted from the first or from the last, is then a straight line in the number of chunks."""
    position, axes = _LOOPS[name]
    chunk = args[position]
    sequences = [(args[i], axis) for i, axis in enumerate(axes) if axis is not None and args[i] is not None]
    whole, axis = max(sequences, key=lambda sequence: sequence[0].shape[sequence[1]])  # tokens, not chunks
    tokens, batch = whole.shape[axis], whole.shape[0] if axis else 1
    chunks, some = -(-tokens // chunk), max(1, _FIRST // (batch * chunk))
    runs: list[list[int]] = []
    while 2 * some < chunks:
        runs.append(_run(name, _shortened(args, axes, tokens, chunk, chunks - some), grain))
        if len(runs) > 2 and all(len(more) > 1.5 * len(less) for less, more in pairwise(runs[-3:])):
            (less, more), half = runs[-2:], len(runs[-2]) // 2
            ends = [*zip(less[:half], more, strict=False), *zip(less[half:], more[half - len(less) :], strict=True)]
            return [end + (end - begin) * (chunks - some) // (some // 2) for begin, end in ends]
        some *= 2
    return _run(name, args, grain)


def _shortened(args: Sequence[Any], axes: Sequence[int | None], tokens: int, chunk: int, removed: int) -> list[Any]:
    """Arguments of a sequence that has ``removed`` chunks fewer, with strides like those of the whole."""
    shorter = list(args)
    for i, axis in enumerate(axes):
        if axis is None or args[i] is None:
            continue
        shape, stride = list(args[i].shape), list(args[i].stride())
        size, step = shape[axis], stride[axis]
        shape[axis] -= removed * chunk if size == tokens else removed
        stride = [n // size * shape[axis] if n > step else n for n in stride]
        shorter[i] = torch.empty_strided(shape, stride, dtype=args[i].dtype, device="meta")
    return shorter


@cache
def _written(func: Any) -> int | str | None:
    """The argument that an operation writes its result into, by position or, where it has to be named, by name; None:
    the result is new, or the argument's shape changes."""
    schema = func._schema
    written = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if len(written) != 1 or len(schema.returns) != 1 or torch.Tag.inplace_view in func.tags:
        return None
    position, argument = written[0]
    return argument.name if argument.kwarg_only else position


def _number(tensor: Tensor) -> float | int | bool:
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _shape(argument: object) -> object:
    """What an operator's memory depends on of an argument."""
    return (argument.shape, argument.stride(), argument.dtype) if isinstance(argument, Tensor) else argument


class _PlannedDevice(TorchFunctionMode):
    """Inside it every tensor says that it is on a GPU, or that it is on the CPU: torch cannot make fake tensors of a
    GPU where it was built without CUDA."""

    def __init__(self, gpu: bool) -> None:
        super().__init__()
        self._answers = {Tensor.is_cuda.__get__: gpu, Tensor.is_cpu.__get__: not gpu}  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._answers[func] if func in self._answers else func(*args, **(kwargs or {}))


@contextmanager
def tracked(gpu: bool, *, autocast: bool = True) -> Iterator[MemoryTracker]:
    """A tracker for a GPU or a CPU, over fake CPU tensors. Where nothing needs autocast or a device's own kernels
    (``autocast`` False), over "meta" tensors, which take a tenth of the time."""
    tensors = FakeTensorMode() if autocast else torch.device("meta")
    with _PlannedDevice(gpu), tensors, MemoryTracker(CUDA_GRAIN if gpu else 1) as tracker:
        yield tracker

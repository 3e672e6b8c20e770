"""Counts the bytes that live tensors hold while a piece of training runs on fake tensors, which have shapes and no
contents.

torch's fake mode knows an operator of ours by its declaration alone, so the workspace inside is not seen. Here the
operator's own Python runs instead, on fake tensors too. Where a step asks for contents, an assumption answers:

* experts get equal shares of the tokens;
* with packed documents, one token in ``_YOUNG`` stands at the beginning of its document;
* any other number that a step reads (the gradient norm, before clipping) is 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from hybridlm.ops.modes import followed, gpu

CUDA_GRAIN = 512  # bytes: torch's allocator for CUDA rounds up to it (c10/cuda/CUDACachingAllocator.h, kMinBlockSize)
_OURS = "hybridlm::"
_YOUNG = 32
_EXPERTS: dict[str, tuple[int, int]] = {
    "hybridlm::experts": (2, 3),
    "hybridlm::experts_backward": (3, 4),
}  # where order and offsets stand


# Of our operators by what their memory hangs on: the most that they hold, results too. Plans of one process share it.
_WORKSPACES: dict[tuple[object, ...], int] = {}


class Ledger(TorchDispatchMode):
    """Within it, and a fake mode below it, ``held`` is what the tensors made since hold, ``peak`` the most that this
    was.

    grain: what an allocator rounds a tensor's bytes up to.
    """

    def __init__(self, grain: int = 1) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._grain = grain
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> int:
        """Begins a new peak; returns the one so far."""
        before, self.peak = self.peak, self.held
        return before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return _number(args[0])
        if func is torch.ops.aten.nonzero_numpy.default:
            return self._places(args[0]).unbind(1)
        if func is torch.ops.aten.nonzero.default:
            return self._places(args[0])
        if name.startswith(_OURS):
            return self._whole(name, func, args)
        out = func(*args, **(kwargs or {}))
        self.hold(out)
        return out

    def _whole(self, name: str, func: Any, args: Sequence[Any]) -> Any:
        """An operator of ours with what happens inside it; the second time with the same shapes, only what it gives
        back."""
        key = (
            gpu(args[0]) if isinstance(args[0], Tensor) else None,
            self._grain,
            name,
            *[_shape(arg) for arg in tree_leaves(args)],
        )
        before = self.held
        if key not in _WORKSPACES:
            peak = self.restart()
            with _disable_current_modes():
                plain = _with_shares(name, [tree_map(self._plain, arg) for arg in args])
                with self:
                    made = OPDEFS[name]._init_fn(*plain)
            _WORKSPACES[key] = self.peak - before
            del made, plain
            self.peak = max(peak, self.peak)
        out = func(*args)
        self.hold(out)
        self.peak = max(self.peak, before + _WORKSPACES[key])
        return out

    def hold(self, made: object) -> None:
        """Counts the storages of ``made`` (a tensor, or a nest of them) that are new, until they die."""
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._know(storage, -(-storage.nbytes() // self._grain) * self._grain)
        self.peak = max(self.peak, self.held)

    def _places(self, found: Tensor) -> Tensor:
        """(n, dimensions), as of ``nonzero``."""
        places = found.new_empty((max(1, found.numel() // _YOUNG), found.dim()), dtype=torch.int64)
        self.hold(places)
        return places

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata

        def forget(_: object) -> None:
            del self._known[key]
            self.held -= size

        self._known[key] = weakref.ref(storage, forget)
        self.held += size

    def _plain(self, argument: object) -> object:
        """A tensor without contents or device in the place of a fake one, not counted: operators take a tenth of the
        time on such."""
        if not isinstance(argument, Tensor):
            return argument
        plain = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")
        self._know(plain.untyped_storage(), 0)
        return plain


def _with_shares(name: str, args: list[Any]) -> list[Any]:
    """The arguments of an operator; where it is one of experts, with the ends of equal shares in the place of
    ``offsets``."""
    if name not in _EXPERTS:
        return args
    order, offsets = _EXPERTS[name]
    pairs, experts = args[order].shape[0], args[offsets].shape[0]
    return [*args[:offsets], torch.tensor([pairs * (i + 1) // experts for i in range(experts)]), *args[offsets + 1 :]]


def _number(tensor: Tensor) -> float | int | bool:
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _shape(argument: object) -> object:
    """What an operator's memory hangs on of an argument."""
    return (argument.shape, argument.stride(), argument.dtype) if isinstance(argument, Tensor) else argument


@contextmanager
def counted(card: tuple[int, int] | None, *, autocast: bool = True) -> Iterator[Ledger]:
    """A ledger for a GPU of this compute capability (None: for a CPU), over fake tensors of the CPU. Where nothing asks
    for autocast or for a device's own kernels (``autocast`` False), over tensors of "meta", a tenth of the work."""
    tensors = FakeTensorMode() if autocast else torch.device("meta")
    with followed(card), tensors, Ledger(1 if card is None else CUDA_GRAIN) as ledger:
        yield ledger

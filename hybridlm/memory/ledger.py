"""Counts the bytes that live tensors hold while a piece of training runs on fake tensors, which have shapes and no contents.

torch's fake mode knows an operator of ours by its declaration alone, so the workspace inside is not seen. Here the operator's own Python
runs instead, on fake tensors too. Where a step asks for contents, an assumption answers:

* experts get equal shares of the tokens;
* with packed documents, one token in ``_YOUNG`` stands at the beginning of its document;
* any other number that a step reads (the gradient norm, before clipping) is 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OURS = "hybridlm::"
_YOUNG = 32
_EXPERTS: dict[str, tuple[int, int]] = {"hybridlm::experts": (2, 3), "hybridlm::experts_backward": (3, 4)}  # where order and offsets stand


class Ledger(TorchDispatchMode):
    """Within it, and a fake mode below it, ``held`` is what the tensors made since hold, ``peak`` the most that this was.

    grain: what an allocator rounds a tensor's bytes up to.
    """

    def __init__(self, grain: int = 1) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._grain = grain
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._workspaces: dict[tuple[object, ...], int] = {}  # of our operators by their arguments' shapes: the most they hold, results too
        self._shares: tuple[int, int] | None = None  # (pairs, experts) while experts run

    def restart(self) -> int:
        """Begins a new peak; returns the one so far."""
        before, self.peak = self.peak, self.held
        return before

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return self._number(args[0])
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((max(1, args[0].numel() // _YOUNG), args[0].dim()), dtype=torch.int64)
        if name.startswith(_OURS):
            return self._whole(name, func, args)
        out = func(*args, **(kwargs or {}))
        self.hold(out)
        return out

    def _whole(self, name: str, func: Any, args: Sequence[Any]) -> Any:
        """An operator of ours with what happens inside it; the second time with the same shapes, only what it gives back."""
        key = (name, *[_shape(arg) for arg in tree_leaves(args)])
        before = self.held
        if (most := self._workspaces.get(key)) is not None:
            out = func(*args)
        else:
            peak = self.restart()
            with self, self._sharing(name, args):
                out = OPDEFS[name]._init_fn(*args)
            most = self._workspaces[key] = self.peak - before
            self.peak = max(peak, self.peak)
        self.hold(out)
        self.peak = max(self.peak, before + most)
        return out

    def hold(self, made: object) -> None:
        """Counts the storages of ``made`` (a tensor, or a nest of them) that are new, until they die."""
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    size = -(-storage.nbytes() // self._grain) * self._grain
                    self._known[key] = weakref.ref(storage, self._death(key, size))
                    self.held += size
        self.peak = max(self.peak, self.held)

    def _death(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            del self._known[key]
            self.held -= size

        return forget

    def _number(self, tensor: Tensor) -> float | int | bool:
        if self._shares is not None:
            pairs, experts = self._shares
            return pairs * (tensor.storage_offset() + 1) // experts
        return True if tensor.dtype == torch.bool else 1 if not tensor.is_floating_point() else 1.0

    @contextmanager
    def _sharing(self, name: str, args: Sequence[Any]) -> Iterator[None]:
        if name in _EXPERTS:
            order, offsets = (args[place] for place in _EXPERTS[name])
            self._shares = (order.shape[0], offsets.shape[0])
        try:
            yield
        finally:
            self._shares = None


def _shape(argument: object) -> object:
    """What an operator's memory hangs on of an argument."""
    return (argument.shape, argument.stride(), argument.dtype) if isinstance(argument, Tensor) else argument


@contextmanager
def counted(grain: int = 1) -> Iterator[Ledger]:
    """A fake mode with a ledger over it."""
    with FakeTensorMode(), Ledger(grain) as ledger:
        yield ledger

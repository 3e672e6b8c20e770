"""What surrounds a call: whether autocast would round it, whether a gradient is wanted of it, and which GPU it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = nullcontext()
_imitated: tuple[int, int] | None = None  # no ContextVar: the compiler cannot read one


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on where x is; never on "meta", of which torch's own question raises."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Within it autocast is off where x is. Where it is off already nothing is done: switching it takes as long as a token's product."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else _NOTHING


def gradient_wanted(*tensors: Tensor | None) -> bool:
    """Whether autograd will record what is done with these tensors.

    Where it will not, an operator with a backward of its own is called as the plain function that it is: its dispatch takes 50 to 100 us,
    more than the work on one token.
    """
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def gpu(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the GPU that x is on, or stands for (``imitating``); None: of no GPU."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else _imitated


@contextmanager
def imitating(capability: tuple[int, int] | None) -> Iterator[None]:
    """Within it tensors of the CPU take the ways that those on a GPU of this compute capability would: a memory plan follows a step with
    fake tensors for a card that this machine may not have. None: they stay what they are."""
    global _imitated
    before, _imitated = _imitated, capability
    try:
        yield
    finally:
        _imitated = before

"""What torch is set to around a call: whether autocast would round it, and whether a gradient is wanted of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = nullcontext()


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on where x is; never on "meta", of which torch's own question raises."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x and a weight: autocast's where that is on."""
    return torch.get_autocast_dtype(x.device.type) if autocast_on(x) and x.dtype != torch.float64 else x.dtype


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Within it autocast is off where x is. Where it is off already nothing is done: switching it takes as long as a token's product."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else _NOTHING


def gradient_wanted(*tensors: Tensor | None) -> bool:
    """Whether autograd will record what is done with these tensors.

    Where it will not, an operator with a backward of its own is called as the plain function that it is: its dispatch takes 50 to 100 us,
    more than the work on one token.
    """
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

"""How a call is run: with autocast or without, and recorded by autograd or as a plain function."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = nullcontext()


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is enabled on x's device. False on "meta", for which torch raises when asked."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x and a weight: autocast's where it is enabled."""
    return torch.get_autocast_dtype(x.device.type) if autocast_on(x) and x.dtype != torch.float64 else x.dtype


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Disables autocast on x's device. Does nothing where it is disabled already: the switch takes as long as a
    product with one token."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else _NOTHING


def gradient_wanted(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on these tensors.

    Where it does not, an operator with its own backward is called as a plain function: its dispatch takes 50 to 100 us,
    more than the work on one token.
    """
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def new_like(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors of the same shapes, dtypes and devices, for an operator's fake implementation."""
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def called(operator: Any, *arguments: Any) -> Any:
    """``operator(*arguments)`` for a torch.library custom operator. Where nothing records or traces the call, runs the
    function behind it instead: an operator's first call imports torch's compiler, which takes longer than loading a
    small model and generating a page with it."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    traced = torch.compiler.is_compiling() or any(
        type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in tensors
    )
    return operator(*arguments) if traced or gradient_wanted(*tensors) else operator._init_fn(*arguments)

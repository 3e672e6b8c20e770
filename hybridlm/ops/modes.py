"""What surrounds a call: whether autocast would round it, whether a gradient is wanted of it, and which GPU it runs
on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")

_NOTHING: AbstractContextManager[None] = nullcontext()
# Of a memory plan that follows a step with fake tensors (``followed``). No ContextVars: the compiler cannot read one.
_imitated: tuple[int, int] | None = None
_brief = False
_ROUNDS = 3  # of a loop that a plan follows


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on where x is; never on "meta", of which torch's own question raises."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x and a weight: autocast's where that is on."""
    return torch.get_autocast_dtype(x.device.type) if autocast_on(x) and x.dtype != torch.float64 else x.dtype


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Within it autocast is off where x is. Where it is off already nothing is done: switching it takes as long as a
    token's product."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else _NOTHING


def gradient_wanted(*tensors: Tensor | None) -> bool:
    """Whether autograd will record what is done with these tensors.

    Where it will not, an operator with a backward of its own is called as the plain function that it is: its dispatch
    takes 50 to 100 us, more than the work on one token.
    """
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def called(operator: Any, *arguments: Any) -> Any:
    """``operator(*arguments)``, one of torch.library's. Where nothing records or traces it, the function behind it is
    called: an operator's first call imports torch's compiler, which takes longer than loading a small model and writing
    a page with it."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    traced = torch.compiler.is_compiling() or any(
        type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in tensors
    )
    return operator(*arguments) if traced or gradient_wanted(*tensors) else operator._init_fn(*arguments)


def gpu(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the GPU that x is on, or stands for (``followed``); None: of no GPU."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else _imitated


def rounds(parts: Sequence[Part]) -> Sequence[Part]:
    """What a loop goes through whose every round takes and gives back the same memory: all of it, or the last few
    rounds where only memory is looked at."""
    return parts[-_ROUNDS:] if _brief else parts


@contextmanager
def followed(capability: tuple[int, int] | None) -> Iterator[None]:
    """Within it tensors have no contents and only their memory is looked at. They take the ways that those on a GPU of
    this compute capability would (None: those of a CPU), so that a step can be planned for a card that this machine
    does not have."""
    global _imitated, _brief
    before = _imitated, _brief
    _imitated, _brief = capability, True
    try:
        yield
    finally:
        _imitated, _brief = before

"""How a call is run: with autocast or without, and recorded by autograd or as a plain function; and how an operator is
told its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
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


def differentiate(
    operator: Any, backward: Any, outputs: str, gradients: str, *, state: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> None:
    """Makes one torch.library custom operator the backward of another.

    outputs: names for what ``operator`` returns. ``backward`` is given what its parameters name: the gradients of
    outputs ("dy" that of y; None where nothing reads y, or zeros if the parameter is not optional), then inputs and
    outputs, tensors first. It returns the gradients of the inputs ``gradients``. state: turns the one of
    "initial_state" into its layout.
    """
    taken, names = [*signature(operator._init_fn).parameters], outputs.split()
    read = {name: index for index, name in enumerate(f"d{name}" for name in names)}
    parameters = signature(backward._init_fn).parameters.values()
    incoming = [(read[one.name], "None" in str(one.annotation)) for one in parameters if one.name in read]

    def setup(ctx: Any, inputs: Sequence[object], output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        known = dict(zip((*taken, *names), (*inputs, *results), strict=True))
        kept = [known[one.name] for one in parameters if one.name not in read]
        tensors = [value for value in kept if value is None or isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.numbers, ctx.shapes = kept[len(tensors) :], [(result.shape, result.dtype) for result in results]
        ctx.dtypes = {name: known[name].dtype for name in gradients.split() if known[name] is not None}
        ctx.set_materialize_grads(False)

    def run(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in given):
            return (None,) * len(taken)
        saved, grads = ctx.saved_tensors, []  # read once: activation checkpointing recomputes them
        for index, optional in incoming:
            shape, dtype = ctx.shapes[index]
            zeros = None if optional or given[index] is not None else saved[0].new_zeros(shape, dtype=dtype)
            grads.append(zeros if given[index] is None else given[index].contiguous())  # type: ignore[union-attr]
        found = dict(zip(gradients.split(), backward(*grads, *saved, *ctx.numbers), strict=True))
        if "initial_state" in ctx.dtypes:
            found["initial_state"] = state(found["initial_state"])
        return tuple(found[name].to(ctx.dtypes[name]) if name in ctx.dtypes else None for name in taken)

    operator.register_autograd(run, setup_context=setup)

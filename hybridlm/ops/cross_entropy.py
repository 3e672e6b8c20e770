"""Linear layer and cross-entropy in one, over chunks of rows: the (tokens x vocabulary) logits never exist as a whole.

For a vocabulary of 32k the logits and their gradient are the largest tensors of a small model's step. Here a chunk of
rows is projected and reduced to its loss and, if gradients are needed, directly to the gradients of the hidden states
and the weight; the backward only scales them. float16 is the exception: unscaled gradients would underflow, so its
backward recomputes them with the loss scale included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridlm.ops.dispatch import autocast_off
from hybridlm.ops.kernels.choice import CUDA, TORCH, Backend
from hybridlm.ops.kernels.rules import loss_refusal
from hybridlm.ops.norm import at_least_fp32

IGNORE = -100  # a target that does not count, as in torch
ROWS = 512  # of logits that exist at once


def cap_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``softcap * tanh(scale * logits / softcap)``; ``softcap=None`` leaves the scaled logits."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _from_logits(
    logits: Tensor, targets: Tensor, vocab: int, scale: float, softcap: float, *, with_grads: bool
) -> tuple[Tensor, Tensor]:
    """Loss of each row and, if asked for, the gradient of the *raw* logits (else scratch), which takes their place.
    logits: (R, V), wide; targets: (R,)."""
    capped = cap_logits(logits, scale, softcap or None)
    slope = (
        scale * (1 - (capped[:, :vocab] / softcap).square()) if softcap and with_grads else None
    )  # d capped / d logits
    if vocab < logits.shape[1]:
        capped[:, vocab:] = -torch.inf  # padded ids: after the cap, so that they stay out of the sum
    counted = targets != IGNORE
    picked = targets.clamp_min(0).unsqueeze(-1)
    exponentials = capped.sub_(capped.amax(-1, keepdim=True))
    target_logits = exponentials.gather(-1, picked).squeeze(-1)
    total = exponentials.exp_().sum(-1)
    losses = (total.log() - target_logits) * counted
    if not with_grads:
        return losses, exponentials
    grad = exponentials.mul_((counted / total).unsqueeze(-1))
    grad.scatter_add_(-1, picked, -counted.to(grad.dtype).unsqueeze(-1))
    if slope is not None:
        grad[:, :vocab] *= slope
    elif scale != 1.0:
        grad *= scale
    return losses, grad


@torch.library.custom_op("hybridlm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    scale: float,
    softcap: float,
    rows: int,
    with_grads: bool,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses and, if asked for, its gradients times ``dtotal`` (empty tensors if not). softcap 0: none.

    All chunks use the same memory for their logits and everything made of them: fresh memory, and passes over (R, V),
    cost as much as a good part of the products.
    """
    wide = at_least_fp32(hidden.dtype)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    dhidden = torch.empty_like(hidden) if with_grads else hidden.new_empty(0)
    dweight = hidden.new_zeros(weight.shape if with_grads else 0, dtype=wide)
    with autocast_off(hidden):
        space = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            some = slice(start, start + rows)
            part = hidden[some]
            logits = torch.mm(part, weight.t(), out=space[: len(part)]).to(wide)
            losses, grad = _from_logits(logits, targets[some], vocab, scale, softcap, with_grads=with_grads)
            total += losses.sum()
            if with_grads:
                grad = (grad if dtotal is None else grad.mul_(dtotal)).to(hidden.dtype)
                torch.mm(grad, weight, out=dhidden[some])
                if grad.dtype == wide:
                    dweight.addmm_(grad.t(), part)
                else:
                    dweight += torch.mm(grad.t(), part)
    return total, dhidden, dweight


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    scale: float,
    softcap: float,
    rows: int,
    with_grads: bool,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = at_least_fp32(hidden.dtype)
    dhidden = torch.empty_like(hidden) if with_grads else hidden.new_empty(0)
    return hidden.new_empty((), dtype=wide), dhidden, hidden.new_empty(weight.shape if with_grads else 0, dtype=wide)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, vocab, scale, softcap, rows, with_grads, _ = inputs
    ctx.settings = (vocab, scale, softcap, rows)  # type: ignore[attr-defined]
    ctx.recompute = not with_grads  # type: ignore[attr-defined]
    ctx.weight_dtype = weight.dtype  # type: ignore[attr-defined]
    ctx.save_for_backward(*((hidden, weight, targets) if not with_grads else output[1:]))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, dtotal: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dtotal is None:
        return (None,) * 9
    if not ctx.recompute:  # type: ignore[attr-defined]
        dhidden, dweight = ctx.saved_tensors  # type: ignore[attr-defined]
        return ((dhidden * dtotal).to(dhidden.dtype), (dweight * dtotal).to(ctx.weight_dtype), *[None] * 7)  # type: ignore[attr-defined]
    hidden, weight, targets = ctx.saved_tensors  # type: ignore[attr-defined]
    _, dhidden, dweight = _linear_cross_entropy(hidden, weight, targets, *ctx.settings, True, dtotal)  # type: ignore[attr-defined]
    return (dhidden, dweight.to(weight.dtype), *[None] * 7)


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab: int,
    scale: float = 1.0,
    softcap: float | None = None,
    rows: int = ROWS,
    backend: Backend = TORCH,
) -> Tensor:
    """Sum over rows of the cross-entropy of ``cap(hidden @ weight^T)``, a scalar in at least fp32 (nats).

    hidden: (R, D); weight: (V, D), rows from ``vocab`` on are padding and get no probability; targets: (R,), IGNORE
    does not count. rows: of logits that exist at once. ``backend`` CUDA: the compiled kernel where it supports this.
    """
    if backend == CUDA and loss_refusal(hidden.dtype, scale=scale) is None:
        from hybridlm.ops.kernels.calls import kernel_linear_cross_entropy

        return kernel_linear_cross_entropy(hidden, weight, targets, vocab=vocab, ignore=IGNORE, softcap=softcap)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    in_forward = wanted and hidden.dtype != torch.float16
    weight = weight.to(hidden.dtype)  # autocast keeps the weight in fp32
    arguments = (hidden, weight, targets, vocab, scale, softcap or 0.0, rows, in_forward, None)
    total: Tensor = _linear_cross_entropy(*arguments)[0]
    return total


def linear_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab: int,
    scale: float = 1.0,
    softcap: float | None = None,
    rows: int = ROWS,
) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy`` row by row: (R,) nats in at least fp32, 0 where the target does not count, and (R,)
    whether the target is the likeliest id. The backward computes each chunk's logits again."""
    table = weight.to(hidden.dtype).t()

    def chunk(part: Tensor, table: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_off(part):
            logits = cap_logits(torch.mm(part, table).to(at_least_fp32(part.dtype)), scale, softcap)[:, :vocab]
            picked = logits.gather(-1, chosen.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            return (logits.logsumexp(-1) - picked) * (chosen != IGNORE), logits.argmax(-1) == chosen

    parts = [
        checkpoint(chunk, part, table, chosen, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else chunk(part, table, chosen)
        for part, chosen in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    losses, likeliest = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return losses, likeliest

"""Muon's update: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The quintic whose iteration pushes every singular value into about [0.7, 1.2]; coefficients from the same source.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Replaces the singular values of each matrix (..., R, C) by values near 1, by Newton-Schulz iterations.

    On a GPU the iteration runs in bfloat16, as published; on a CPU in float32, which is faster there, and exact.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.promote_types(matrices.dtype, torch.float32))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result.to(matrices.dtype)


def muon_updates(updates: Sequence[Tensor], row_blocks: Sequence[tuple[int, ...]], steps: int) -> list[Tensor]:
    """The orthogonalised updates, each scaled by sqrt(max(1, rows / columns)) so that its effect on the output does not
    depend on shape.

    updates: matrices (R, C), or one per expert (E, R, C), each orthogonalised separately. row_blocks: for each update,
    the row counts of the independent projections stacked in it, empty for one: these are orthogonalised separately too.
    Blocks of the same shape go through one batched product.
    """
    parts = [
        block
        for update, sizes in zip(updates, row_blocks, strict=True)
        for block in update.split(sizes or update.shape[-2], dim=-2)
    ]
    by_shape: dict[torch.Size, list[int]] = {}
    for i, part in enumerate(parts):
        by_shape.setdefault(part.shape[-2:], []).append(i)
    done: dict[int, Tensor] = {}
    for (rows, columns), members in by_shape.items():
        stacks = [parts[i].reshape(-1, rows, columns) for i in members]
        orthogonal = orthogonalize(torch.cat(stacks), steps) * max(1.0, rows / columns) ** 0.5
        results = orthogonal.split([stack.shape[0] for stack in stacks])
        done |= {i: result.view(parts[i].shape) for i, result in zip(members, results, strict=True)}
    ready = iter(done[i] for i in range(len(parts)))
    return [torch.cat([next(ready) for _ in (sizes or (0,))], dim=-2) for sizes in row_blocks]

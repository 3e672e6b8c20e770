"""One line of Triton, to see whether it compiles and runs here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _double(x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, 2 * tl.load(x + place, mask=place < size), mask=place < size)


def doubled(x: torch.Tensor) -> torch.Tensor:
    """2 x, of a contiguous x."""
    out = torch.empty_like(x)
    _double[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
    return out

"""The feed-forward networks of many experts, each over the tokens that were sent to it.

The N k pairs of a token and one of its experts are sorted by expert, so that an expert's tokens are contiguous and its
products are matrix products. Two implementations compute the same:

* A loop over the experts, each over its own slice, with a hand-written backward that saves one tensor (the hidden units
  before the activation). Element-wise work stays in cache. It needs the experts' counts on the host: on a GPU that is a
  synchronisation.
* torch's grouped product, all experts in one kernel that reads the counts on the GPU. Only its bfloat16 kernels are
  more than a loop inside torch; on a CPU it is slower than the loop here.

Neither drops a token, and an expert without tokens gets a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.ops.dispatch import called, differentiate, new_like
from hybridlm.ops.norm import at_least_fp32

_ALIGNMENT = 16  # bytes, of the rows that torch's grouped product takes


def _slices(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which they are. offsets: (E,), the end of each expert's rows."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _inverse(order: Tensor) -> Tensor:
    """Where each pair went: ``inverse[order[i]] = i``."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


def _sum_pairs(rows: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Row n of the result is the sum of token n's k rows: (N k, D), sorted by expert, to (N, D).

    Read by the token instead of added from the pair: the same sum in the same order, whatever the device and its
    threads do.
    """
    return F.embedding_bag(_inverse(order).view(-1, top_k), rows, mode="sum")


def _activate(hidden: Tensor, gated: bool) -> Tensor:
    """``silu(gate) * up`` of (R, 2 I) = [gate | up], or ``relu(up)^2`` of (R, I)."""
    if gated:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.relu(hidden).square()


def _activate_for_backward(hidden: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """``_activate``, and the factor of it that ``_activate_backward`` would compute again: silu(gate), or relu(up)."""
    if gated:
        gate, up = hidden.chunk(2, dim=-1)
        factor = F.silu(gate)
        return factor * up, factor
    factor = F.relu(hidden)
    return factor.square(), factor


def _activate_backward(dactive: Tensor, hidden: Tensor, factor: Tensor, gated: bool) -> Tensor:
    """The gradient of ``hidden``. dactive: (R, I), used up."""
    if not gated:
        return dactive.mul_(factor).mul_(2)
    gate, up = hidden.chunk(2, dim=-1)
    dhidden = torch.empty_like(hidden)
    dgate, dup = dhidden.chunk(2, dim=-1)
    torch.mul(dactive, factor, out=dup)
    torch.ops.aten.silu_backward.grad_input(dactive.mul_(up), gate, grad_input=dgate)
    return dhidden


@torch.library.custom_op("hybridlm::experts", mutates_args=())
def _experts(
    x: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, up: Tensor, down: Tensor, gated: bool
) -> tuple[Tensor, Tensor]:
    """Returns y (N, D) and the hidden units (N k, 2 I or I) before the activation, sorted by expert. Arguments as in
    ``_experts_loop``."""
    top_k = weights.shape[1]
    tokens, scale = order // top_k, weights.flatten()[order].unsqueeze(1)
    hidden = x.new_empty(order.shape[0], up.shape[1])
    out = x.new_empty(order.shape[0], x.shape[1])
    for expert, rows in _slices(offsets):
        torch.mm(x.index_select(0, tokens[rows]), up[expert].t(), out=hidden[rows])
        # The weight multiplies the I hidden units and not the D outputs: then the backward needs no output to find its
        # gradient.
        torch.mm(_activate(hidden[rows], gated).mul_(scale[rows]), down[expert].t(), out=out[rows])
    return _sum_pairs(out, order, top_k), hidden


_experts.register_fake(
    lambda x, weights, order, offsets, up, down, gated: (
        x.new_empty(x.shape),
        x.new_empty(order.shape[0], up.shape[1]),
    )
)


@torch.library.custom_op("hybridlm::experts_backward", mutates_args=())
def _experts_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    up: Tensor,
    down: Tensor,
    hidden: Tensor,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up and down."""
    top_k = weights.shape[1]
    tokens, scale = order // top_k, weights.flatten()[order].unsqueeze(1)
    dx_pairs = x.new_empty(order.shape[0], x.shape[1])
    dscale = weights.new_empty(order.shape[0], dtype=at_least_fp32(x.dtype))
    dup, ddown = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (up, down))
    slices = dict(_slices(offsets))
    for expert in range(down.shape[0]):
        if expert not in slices:
            dup[expert], ddown[expert] = 0.0, 0.0
            continue
        rows = slices[expert]
        dy_rows = dy.index_select(0, tokens[rows])
        dactive = dy_rows @ down[expert]  # before the weight is taken into account
        active, factor = _activate_for_backward(hidden[rows], gated)
        torch.sum(dactive * active, -1, dtype=dscale.dtype, out=dscale[rows])
        torch.mm(dy_rows.t(), active.mul_(scale[rows]), out=ddown[expert])
        dhidden = _activate_backward(dactive.mul_(scale[rows]), hidden[rows], factor, gated)
        torch.mm(dhidden.t(), x.index_select(0, tokens[rows]), out=dup[expert])
        torch.mm(dhidden, up[expert], out=dx_pairs[rows])
    dweights = dscale[_inverse(order)].view(weights.shape).to(weights.dtype)
    return _sum_pairs(dx_pairs, order, top_k), dweights, dup, ddown


_experts_backward.register_fake(
    lambda dy, x, weights, order, offsets, up, down, hidden, gated: tuple(new_like(x, weights, up, down))
)


differentiate(_experts, _experts_backward, "y hidden", "x weights up down")


def _experts_grouped(
    x: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, up: Tensor, down: Tensor, gated: bool
) -> Tensor:
    """All experts at once with torch's grouped product, differentiated by autograd. order: (N k,), offsets: (E,)
    int32."""
    top_k = weights.shape[1]
    # Spread and then permuted: every index is met once, so that the backward adds nothing up in an order of chance.
    rows = x.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1).index_select(0, order)
    hidden = F.grouped_mm(rows, up.mT, offs=offsets)
    active = (_activate(hidden, gated) * weights.flatten().index_select(0, order).unsqueeze(1)).to(x.dtype)
    out = F.grouped_mm(active, down.mT, offs=offsets)
    return out.index_select(0, _inverse(order)).view(-1, top_k, x.shape[1]).sum(1)


def _grouped_kernels(x: Tensor, down: Tensor) -> bool:
    """Whether torch has a grouped kernel for these tensors, not a loop behind the same name. (On cards older than 8.0,
    which do not train in bfloat16, it uses that loop.)"""
    aligned = all(width * x.element_size() % _ALIGNMENT == 0 for width in down.shape[1:])
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned


def mixture(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, *, gated: bool) -> Tensor:
    """``y_n = sum_j weights_nj expert_(experts_nj)(x_n)``, (N, D) in x's dtype.

    x: (N, D); experts: (N, k) integers below E, distinct within a row; weights: (N, k); down: (E, D, I). With
    ``gated``, up is (E, 2 I, D) = [gate | up] and an expert is ``down(silu(gate x) * up x)``; else up is (E, I, D) and
    it is ``down(relu(up x)^2)``. up and down have x's dtype; weights may be wider.
    """
    order = experts.flatten().argsort(stable=True)  # of the pairs: token n's slot j is pair n k + j
    counts = torch.zeros(down.shape[0], dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, experts.flatten(), torch.ones_like(order))
    offsets = counts.cumsum(0).to(torch.int32)
    if _grouped_kernels(x, down):
        return _experts_grouped(x, weights, order, offsets, up, down, gated)
    y: Tensor = called(_experts, x, weights, order, offsets, up, down, gated)[0]
    return y

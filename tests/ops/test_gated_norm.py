"""The operator behind the gated norm: what it declares is what it does, also for inputs that are views, and it keeps
little."""

from __future__ import annotations

import pytest
import torch
from recurrences import assert_near, group_rms_norm, silu
from torch import Tensor

from hybridlm.ops.norm import gated_rms_norm

EPS = 1e-5


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """y (2, 3, 8), z cut out of a wider tensor as the layer cuts it out of its projection, weight (8,)."""
    g = torch.Generator().manual_seed(0)
    y, z, weight = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((2, 3, 8), (2, 3, 20), (8,))
    )
    return y, z[..., 5:13], weight


def formula(y: Tensor, z: Tensor, weight: Tensor, groups: int, norm_before_gate: bool) -> Tensor:
    if norm_before_gate:
        return group_rms_norm(y, weight, groups, EPS) * silu(z)
    return group_rms_norm(y * silu(z), weight, groups, EPS)


every_form = pytest.mark.parametrize(("groups", "norm_before_gate"), [(1, False), (2, False), (1, True), (4, True)])


@every_form
def test_output_and_every_gradient_of_views(groups, norm_before_gate):
    leaves = [tensor.requires_grad_() for tensor in make_inputs()]
    dout = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).transpose(1, 2)
    results = []
    for out in (
        gated_rms_norm(*leaves, EPS, groups=groups, norm_before_gate=norm_before_gate),
        formula(*leaves, groups, norm_before_gate),
    ):
        grads = torch.autograd.grad(out, leaves, dout)
        results.append({"out": out} | {f"d{i}": grad for i, grad in enumerate(grads)})
    assert_near(*results, 1e-12)


@every_form
def test_gradcheck(groups, norm_before_gate):
    def function(*leaves: Tensor) -> Tensor:
        return gated_rms_norm(*leaves, EPS, groups=groups, norm_before_gate=norm_before_gate)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in make_inputs()])


def test_narrow_activations_keep_a_wide_weight_and_their_own_dtypes():
    y, z, weight = make_inputs(torch.float32)
    leaves = [y.bfloat16().requires_grad_(), z.bfloat16().requires_grad_(), weight.requires_grad_()]
    out = gated_rms_norm(*leaves, EPS, groups=2, norm_before_gate=False)
    want = formula(*(leaf.double() for leaf in leaves), 2, False)
    grads, wide = (torch.autograd.grad(side, leaves, torch.ones_like(side)) for side in (out, want))
    assert [tensor.dtype for tensor in (out, *grads)] == [torch.bfloat16] * 3 + [torch.float32]
    assert_near(dict(enumerate((out, *grads))), dict(enumerate((want, *wide))), 2**-8)


@every_form
def test_opcheck(groups, norm_before_gate):
    y, z, weight = make_inputs(torch.float32)
    leaves = (y.requires_grad_(), z.detach().requires_grad_(), weight.requires_grad_())
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.hybridlm.gated_rms_norm.default,
        (*leaves, EPS, groups, norm_before_gate),
        test_utils="ALL" if groups == 2 else quick,
    )
    _, inverse = torch.ops.hybridlm.gated_rms_norm(*(leaf.detach() for leaf in leaves), EPS, groups, norm_before_gate)
    args = (torch.ones_like(y.detach()), *(leaf.detach() for leaf in leaves), inverse, norm_before_gate)
    torch.library.opcheck(torch.ops.hybridlm.gated_rms_norm_backward.default, args, test_utils=quick)


@every_form
def test_only_its_inputs_and_one_number_per_group_are_kept(groups, norm_before_gate):
    y, z, weight = make_inputs(torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated_rms_norm(
            y.requires_grad_(),
            z.detach().requires_grad_(),
            weight.requires_grad_(),
            EPS,
            groups=groups,
            norm_before_gate=norm_before_gate,
        )
    own = {tensor.untyped_storage().data_ptr() for tensor in (y, z, weight)}
    assert sum(tensor.numel() for tensor in kept if tensor.untyped_storage().data_ptr() not in own) == 2 * 3 * groups

"""The fused head and loss against torch's own cross-entropy and against a loop over rows, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from recurrences import assert_near, relative_error
from recurrences import cross_entropy as loop
from torch import Tensor

from hybridlm.ops.cross_entropy import IGNORE, cap_logits, linear_cross_entropy, linear_token_losses

WIDTH, VOCAB, PADDED = 5, 11, 16


def make_inputs(
    rows: int, *, ignored: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCAB, (rows,), generator=g)
    targets[torch.randperm(rows, generator=g)[: min(ignored, rows - 1)]] = IGNORE
    return hidden, weight, targets


def torch_loss(hidden, weight, targets, *, vocab=VOCAB, scale=1.0, softcap=None):
    logits = scale * (hidden @ weight[:vocab].T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def run(loss, hidden, weight, targets, *, factor=0.37, **settings) -> dict[str, Tensor]:
    """The loss and both gradients of ``factor`` times it."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total = loss(hidden, weight, targets, vocab=VOCAB, **settings)
    dhidden, dweight = torch.autograd.grad(total * factor, [hidden, weight])
    return {"loss": total, "dhidden": dhidden, "dweight": dweight}


SETTINGS = [{"scale": scale, "softcap": cap} for scale, cap in product([1.0, 0.25, 3.0], [None, 2.0, 30.0])]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 600])
def test_loss_and_gradients(rows, settings):
    """600 rows are more than one chunk of the implementation, and not a multiple of one."""
    inputs = make_inputs(rows)
    assert_near(run(linear_cross_entropy, *inputs, **settings), run(torch_loss, *inputs, **settings), 1e-12)


def test_the_loop_agrees_too():
    hidden, weight, targets = make_inputs(9)
    total, _ = loop(hidden, weight, targets, VOCAB, scale=0.7, softcap=4.0)
    assert (
        relative_error(linear_cross_entropy(hidden, weight, targets, vocab=VOCAB, scale=0.7, softcap=4.0), total)
        < 1e-13
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padded_ids_have_no_probability_and_no_gradient(softcap):
    hidden, weight, targets = make_inputs(9)
    weight[VOCAB:] = 100.0 * hidden[0]  # would win everywhere
    result = run(linear_cross_entropy, hidden, weight, targets, softcap=softcap)
    assert_near(result, run(torch_loss, hidden, weight, targets, softcap=softcap), 1e-12)
    assert bool((result["dweight"][VOCAB:] == 0).all())


def test_ignored_targets_count_for_nothing():
    hidden, weight, targets = make_inputs(9, ignored=4)
    counted = targets != IGNORE
    result = run(linear_cross_entropy, hidden, weight, targets)
    alone = run(linear_cross_entropy, hidden[counted], weight, targets[counted])
    assert relative_error(result["loss"], alone["loss"]) < 1e-14
    assert relative_error(result["dweight"], alone["dweight"]) < 1e-14
    assert bool((result["dhidden"][~counted] == 0).all())
    assert bool((result["dhidden"][counted] != 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_all_ignored_is_zero_and_not_nan(dtype):
    hidden, weight, targets = make_inputs(6, dtype=dtype)
    result = run(linear_cross_entropy, hidden, weight, torch.full_like(targets, IGNORE), softcap=5.0)
    assert all(bool((tensor == 0).all()) for tensor in result.values())


def test_large_logits_do_not_overflow():
    hidden, weight, targets = make_inputs(8)
    hidden = (hidden * 1000).float()
    weight = weight.float()
    assert_near(
        run(linear_cross_entropy, hidden, weight, targets),
        run(torch_loss, hidden.double(), weight.double(), targets),
        1e-5,
    )


@pytest.mark.parametrize(("wanted", "none"), [(0, 1), (1, 0)])
def test_one_gradient_without_the_other(wanted, none):
    """A frozen trunk or a frozen head."""
    inputs = list(make_inputs(7))
    full = run(linear_cross_entropy, *inputs)
    inputs[wanted].requires_grad_()
    linear_cross_entropy(*inputs, vocab=VOCAB).backward()
    assert relative_error(inputs[wanted].grad * 0.37, full["dhidden" if wanted == 0 else "dweight"]) < 1e-14
    assert inputs[none].grad is None


def test_without_gradients_the_value_is_the_same():
    hidden, weight, targets = make_inputs(600)
    hidden.requires_grad_()
    with torch.no_grad():
        total = linear_cross_entropy(hidden, weight, targets, vocab=VOCAB, scale=0.5, softcap=3.0)
    assert not total.requires_grad
    assert relative_error(total, torch_loss(hidden, weight, targets, scale=0.5, softcap=3.0)) < 1e-13


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_narrow_dtypes_sum_in_float32(softcap, dtype, tolerance):
    """float16 takes the other path: its gradients are computed in the backward."""
    hidden, weight, targets = make_inputs(600, dtype=dtype)
    got = run(linear_cross_entropy, hidden, weight, targets, scale=0.5, softcap=softcap)
    want = run(torch_loss, hidden.double(), weight.double(), targets, scale=0.5, softcap=softcap)
    assert got["loss"].dtype == torch.float32
    assert got["dhidden"].dtype == got["dweight"].dtype == dtype
    assert_near(got, want, tolerance)


def test_float16_gradients_do_not_underflow():
    """Gradients below float16's smallest number (6e-8) must have the loss scale on them before they are rounded."""
    hidden, weight, targets = make_inputs(6, dtype=torch.float16)
    settings = {"scale": 1e-8, "factor": 2.0**16}
    got = run(linear_cross_entropy, hidden, weight, targets, **settings)
    want = run(torch_loss, hidden.double(), weight.double(), targets, **settings)
    assert 0 < float(want["dhidden"].abs().max()) / 2**16 < 6e-8
    assert_near(got, want, 3e-3)


@pytest.mark.parametrize("factor", [1 / 3, 1 / 600])
def test_the_loss_weight_is_not_rounded_to_bfloat16(factor):
    """A rounded factor would scale the whole trunk's gradient, unlike the head's, by up to 0.4%; rounding single
    entries averages out."""
    hidden, weight, targets = make_inputs(600, dtype=torch.bfloat16)
    whole, part = (
        run(linear_cross_entropy, hidden, weight, targets, factor=f)["dhidden"].double() for f in (1.0, factor)
    )
    ratio = float((part * whole).sum() / (whole * whole).sum())
    assert ratio == pytest.approx(factor, rel=3e-4)


def test_the_logits_never_exist_as_a_whole():
    rows = 1300
    hidden, weight, targets = make_inputs(rows, dtype=torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        linear_cross_entropy(hidden, weight, targets, vocab=VOCAB, softcap=3.0).backward()
    shapes = [shape for event in profile.events() for shape in event.input_shapes if len(shape) == 2]
    assert [rows, WIDTH] in shapes, "the profiler saw nothing"
    largest = max(shape[0] for shape in shapes if shape[1] in (VOCAB, PADDED))
    assert 0 < largest < rows


def test_gradcheck():
    hidden, weight, targets = make_inputs(4, ignored=1)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, vocab=VOCAB, scale=0.8, softcap=2.0), [hidden, weight]
    )


@pytest.mark.parametrize("with_grads", [True, False])
def test_opcheck(with_grads):
    hidden, weight, targets = make_inputs(6, dtype=torch.float32)
    args = (hidden.requires_grad_(), weight.requires_grad_(), targets, VOCAB, 0.8, 2.0, 4, with_grads)
    torch.library.opcheck(torch.ops.hybridlm.linear_cross_entropy.default, args)


def test_cap_logits():
    logits = torch.tensor([-1e4, -1.0, 0.0, 2.0, 1e4], dtype=torch.float64)
    assert torch.equal(cap_logits(logits, 1.0, None), logits)
    assert torch.equal(cap_logits(logits, 0.5, None), 0.5 * logits)
    assert relative_error(cap_logits(logits, 0.5, 3.0), 3 * torch.tanh(0.5 * logits / 3)) < 1e-15
    assert cap_logits(logits, 1.0, 3.0).abs().max() <= 3


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_losses_row_by_row(softcap):
    """Each row's loss is torch's, the sum that of the fused loss, and the likeliest id is never a padded one."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 6, generator=generator, dtype=torch.float64)  # more rows than one chunk
    weight = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    weight[13:] *= 100  # padding that would win
    targets = torch.randint(13, (700,), generator=generator)
    targets[::5] = IGNORE
    losses, likeliest = linear_token_losses(hidden, weight, targets, vocab=13, scale=1.5, softcap=softcap)
    logits = 1.5 * hidden @ weight[:13].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(likeliest, logits.argmax(-1) == targets)
    total = linear_cross_entropy(hidden, weight, targets, vocab=13, scale=1.5, softcap=softcap)
    torch.testing.assert_close(losses.sum(), total, rtol=1e-12, atol=1e-12)


def test_fewer_rows_at_once_change_nothing():
    hidden, weight, targets = make_inputs(11)
    losses = []
    for rows in (512, 4):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, targets, vocab=VOCAB, softcap=2.0, rows=rows)
        loss.backward()
        losses.append((loss, h.grad, w.grad))
    for many, few in zip(*losses, strict=True):
        torch.testing.assert_close(few, many, rtol=1e-12, atol=1e-12)

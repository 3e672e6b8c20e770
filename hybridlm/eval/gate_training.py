"""The gate's checks of training: recomputed activations, gradients against differences of the loss, and routing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from hybridlm.eval.gate_subject import Findings, Subject, compare_gradients, relative, total_loss

_STEPS = (3e-5, 2e-6, 2e-7)  # of the difference quotient, as shares of each parameter's size
_GOOD = 1e-7  # an error after which no shorter step is tried


def checkpointing(subject: Subject) -> Findings:
    """Checkpointed blocks against blocks that keep their activations."""
    kept_loss, kept = subject.gradients(*subject.packed, with_aux=True)
    subject.model.checkpoint_blocks = 1
    try:
        loss, recomputed = subject.gradients(*subject.packed, with_aux=True)
    finally:
        subject.model.checkpoint_blocks = 0
    yield relative(loss, kept_loss), "loss"
    yield from compare_gradients(recomputed, kept, "recomputed")


def gradients(subject: Subject) -> Findings:
    """Every parameter has a finite gradient; one that is zero everywhere belongs to a parameter that the loss does not
    depend on."""
    for name, grad in subject.plain_gradients.items():
        if grad is None:
            yield math.inf, f"{name} gets no gradient"
        elif not bool(grad.isfinite().all()):
            yield math.inf, f"the gradient of {name} is not finite"
        elif bool(grad.any()):
            yield 0.0, name
        else:
            before, moved = (_loss(subject, {name: _drawn(grad, subject.generator(7))}, step) for step in (0, 1e-3))
            yield abs(moved / before - 1), f"the gradient of {name} is zero, but the loss depends on it"


def derivative(subject: Subject) -> Findings:
    """The loss's derivative along a random direction through all parameters: autograd against a central difference."""
    grads = {name: grad for name, grad in subject.plain_gradients.items() if grad is not None}
    direction = _direction(subject, grads)
    products = [grads[name] * direction[name] for name in grads]
    exact = sum(float(product.sum()) for product in products)
    scale = max(abs(exact), math.sqrt(sum(float(product.square().sum()) for product in products)), 1e-30)
    found = []
    for step in _STEPS:  # a step may cross the point where a router changes its mind: then a shorter step is tried
        quotient = (_loss(subject, direction, step) - _loss(subject, direction, -step)) / (2 * step)
        error = abs(quotient - exact) / scale
        found.append((math.inf if math.isnan(error) else error, f"autograd {exact:.6g}, difference {quotient:.6g}"))
        if error <= _GOOD:
            break
    yield min(found)


def _loss(subject: Subject, direction: Mapping[str, Tensor], step: float) -> float:
    """Of the first plain text, with the parameters moved by ``step`` along a direction."""
    ids, targets = subject.plain
    with torch.no_grad():
        moved = {name: subject.model.get_parameter(name) + step * along for name, along in direction.items()}
        return float(total_loss(functional_call(subject.model, moved, (ids,), {"targets": targets})))


def _direction(subject: Subject, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random direction in which every parameter has about the same share, so that none hides behind a larger one."""
    generator = subject.generator(6)
    size = {name: float(subject.model.get_parameter(name).detach().square().mean().sqrt()) for name in grads}
    share = {name: size[name] * float(grad.norm()) for name, grad in grads.items()}
    usual = sorted(share.values())[len(share) // 2]
    return {
        name: _drawn(grad, generator) * size[name] * (min(1.0, usual / share[name]) if share[name] > 0 else 1.0)
        for name, grad in grads.items()
    }


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape).uniform_(-1.0, 1.0, generator=generator).to(like.dtype)


def experts(subject: Subject) -> Findings:
    """Padding reaches no expert and no statistic; each token reaches top_k; a uniform router has a balance loss of 1.
    Nothing where no layer has experts."""
    x = torch.empty(2, subject.plan.tokens, subject.model.config.d_model, dtype=torch.float64)
    x.uniform_(-1.0, 1.0, generator=subject.generator(8))
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[0, :7] = False
    for i, block in enumerate(subject.blocks):
        ffn = block.ffn
        if ffn is None or not ffn.n_experts:
            continue
        routers = {name: p for name, p in ffn.named_parameters() if p.shape == (ffn.n_experts, x.shape[-1])}
        with torch.no_grad():
            padded, stats = ffn(x, valid)
            alone, bare = ffn(x[valid].unsqueeze(0))
            other = ffn(x.masked_fill(~valid.unsqueeze(-1), 3.0), valid)[0]
            zeros = {name: torch.zeros_like(router) for name, router in routers.items()}
            uniform = functional_call(ffn, zeros, (x,))[1]
        yield relative(padded[valid], alone[0]), f"layer {i}: outputs next to padding"
        for name, with_padding, without in zip(stats._fields, stats, bare, strict=True):
            yield relative(with_padding.double(), without.double()), f"layer {i}: {name} counts padding"
        places = ffn.top_k * int(valid.sum())
        yield abs(float(stats.counts.sum()) / places - 1), f"layer {i}: the router should hand out {places} places"
        yield relative(other[valid], padded[valid]), f"layer {i}: the content of padding reaches tokens"
        if len(routers) != 1:
            yield math.inf, f"layer {i}: {len(routers)} parameters look like the router's weight"
        balance = float(uniform.balance_loss)
        yield abs(balance - 1.0), f"layer {i}: balance loss {balance:.6g} of uniform routing"

"""The gate's rows about training: recomputed activations, gradients against differences of the loss, and routing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hybridlm.eval.gate_subject import Subject, Worst, compare_gradients, relative

_STEPS = (3e-5, 2e-6, 2e-7)  # of the difference quotient, as shares of each parameter's size
_GOOD = 1e-7  # an error after which no shorter step is tried


def checkpointing(subject: Subject) -> Worst:
    """Checkpointed blocks against blocks that keep their activations."""
    worst, model = Worst(), subject.model
    ids, targets, documents = subject.packed
    kept = subject.gradients(model(ids, doc_ids=documents, targets=targets), with_aux=True)
    model.checkpoint_blocks = 1
    try:
        again = subject.gradients(model(ids, doc_ids=documents, targets=targets), with_aux=True)
    finally:
        model.checkpoint_blocks = 0
    worst.see(relative(again[0], kept[0]), "loss")
    compare_gradients(again[1], kept[1], worst, "recomputed")
    return worst


def gradients(subject: Subject) -> Worst:
    """Every parameter has a finite gradient; one that is zero everywhere belongs to a parameter that the loss does not
    depend on."""
    worst = Worst()
    for name, grad in subject.plain_gradients.items():
        if grad is None:
            worst.see(torch.inf, f"{name} gets no gradient")
        elif not bool(grad.isfinite().all()):
            worst.see(torch.inf, f"the gradient of {name} is not finite")
        elif not bool(grad.any()):
            worst.see(_loss_moves_with(subject, name), f"the gradient of {name} is zero, but the loss depends on it")
    return worst


def derivative(subject: Subject) -> Worst:
    """The loss's derivative along a random direction through all parameters: autograd against a central difference."""
    worst, model = Worst(), subject.model
    grads = {name: grad for name, grad in subject.plain_gradients.items() if grad is not None}
    parameters = dict(model.named_parameters())
    direction = _direction(subject, grads, parameters)
    exact = sum(float((grads[name] * direction[name]).sum()) for name in grads)
    scale = math.sqrt(sum(float((grads[name] * direction[name]).square().sum()) for name in grads))
    best, quotient = math.inf, math.nan
    for step in _STEPS:  # a step may cross the point where a router changes its mind: then a shorter step is tried
        values = []
        for move in (step, -2 * step):
            _move(parameters, direction, move)
            values.append(_plain_loss(subject))
        _move(parameters, direction, step)
        quotient = (values[0] - values[1]) / (2 * step)
        error = abs(quotient - exact) / max(abs(exact), scale, 1e-30)
        best = min(best, math.inf if math.isnan(error) else error)
        if best <= _GOOD:
            break
    worst.see(best, f"autograd {exact:.6g}, difference {quotient:.6g}")
    return worst


def _plain_loss(subject: Subject) -> float:
    with torch.no_grad():
        output = subject.model(subject.text[:1], targets=subject.plain_targets)
        assert output.loss_sum is not None
        return float(output.loss_sum if output.aux is None else output.loss_sum + output.aux)


def _direction(subject: Subject, grads: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random direction in which every parameter has about the same share, so that none hides behind a larger one."""
    generator = subject.generator(6)
    size = {name: float(parameters[name].detach().square().mean().sqrt()) for name in grads}
    share = {name: size[name] * float(grad.norm()) for name, grad in grads.items()}
    usual = sorted(share.values())[len(share) // 2]
    direction = {}
    for name, grad in grads.items():
        weight = min(1.0, usual / share[name]) if share[name] > 0 else 1.0
        drawn = torch.empty(grad.shape, dtype=torch.float32).uniform_(-1.0, 1.0, generator=generator)
        direction[name] = drawn.to(torch.float64).mul_(size[name] * weight)
    return direction


def _move(parameters: Mapping[str, Tensor], direction: dict[str, Tensor], step: float) -> None:
    with torch.no_grad():
        for name, along in direction.items():
            parameters[name].add_(along, alpha=step)


def _loss_moves_with(subject: Subject, name: str) -> float:
    """How much the loss changes, as a share of it, where the parameter is moved."""
    parameter = dict(subject.model.named_parameters())[name]
    kept = parameter.detach().clone()
    before = _plain_loss(subject)
    drawn = torch.empty(kept.shape, dtype=torch.float32).uniform_(-1e-3, 1e-3, generator=subject.generator(7))
    _move({name: parameter}, {name: drawn.to(kept.dtype)}, 1.0)
    after = _plain_loss(subject)
    with torch.no_grad():
        parameter.copy_(kept)
    return abs(after - before) / abs(before)


def experts(subject: Subject) -> Worst:
    """Padding reaches no expert and no statistic; each token reaches top_k; a uniform router has a balance loss of
    1."""
    worst = Worst()
    x = torch.empty(2, subject.plan.tokens, subject.model.config.d_model, dtype=torch.float64)
    x.uniform_(-1.0, 1.0, generator=subject.generator(8))
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[0, :7] = False
    for i, block in enumerate(subject.blocks):
        ffn = block.ffn
        if ffn is None or not ffn.n_experts:
            continue
        with torch.no_grad():
            padded, stats = ffn(x, valid)
            alone, bare = ffn(x[valid].unsqueeze(0))
            worst.see(relative(padded[valid], alone[0]), f"layer {i}: outputs next to padding")
            for name, with_padding, without in zip(stats._fields, stats, bare, strict=True):
                worst.see(relative(with_padding.double(), without.double()), f"layer {i}: {name} counts padding")
            wanted = ffn.top_k * int(valid.sum())
            worst.see(
                abs(float(stats.counts.sum()) - wanted) / wanted,
                f"layer {i}: the router should hand out {wanted} places",
            )
            other = x.masked_fill(~valid.unsqueeze(-1), 3.0)
            worst.see(
                relative(ffn(other, valid)[0][valid], padded[valid]),
                f"layer {i}: the content of padding reaches tokens",
            )
            router = [p for p in ffn.parameters() if p.shape == (ffn.n_experts, x.shape[-1])]
            if len(router) == 1:
                kept = router[0].clone()
                router[0].zero_()
                uniform = ffn(x)[1]
                router[0].copy_(kept)
                worst.see(
                    abs(float(uniform.balance_loss) - 1.0),
                    f"layer {i}: balance loss {float(uniform.balance_loss):.6g} of uniform routing",
                )
            else:
                worst.see(torch.inf, f"layer {i}: {len(router)} parameters look like the router's weight")
    return worst

"""The LightningModule's helpers: gradients of losses that are not finite, and the sums of a validation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.model.build import fresh_model
from hybridlm.train.lightning_module import log_loss, propagate_non_finite
from hybridlm.train.objective import NextToken


def test_propagating_changes_no_bit_of_a_finite_loss():
    x = torch.tensor(0.1, requires_grad=True)
    loss = propagate_non_finite(x * 3)
    loss.backward()
    assert loss.item() == (x * 3).item()
    assert x.grad.item() == 3.0
    y = torch.tensor(2.0, requires_grad=True)
    propagate_non_finite(y + math.inf).backward()
    assert math.isnan(y.grad)


def test_sums_of_two_micro_batches_log_the_mean_over_all_targets(tiny):
    model = fresh_model(compose_config(tiny).model, 257, seed=0, device="cpu")
    ids = torch.arange(64).reshape(4, 16)
    targets = torch.where(ids % 5 == 0, -100, ids + 1)
    whole = {"ids": ids, "targets": targets, "n_bytes": torch.tensor(51)}
    parts = [
        {"ids": ids[rows], "targets": targets[rows], "n_bytes": torch.tensor(size)}
        for rows, size in ((slice(0, 1), 12), (slice(1, 4), 39))
    ]
    with torch.no_grad():
        want, got = NextToken().sums(model, whole), sum(NextToken().sums(model, part) for part in parts)
    torch.testing.assert_close(got, want)
    assert want[1] == (targets >= 0).sum()
    logged = {}
    strategy = SimpleNamespace(reduce=lambda sums, reduce_op: sums)
    module = SimpleNamespace(
        trainer=SimpleNamespace(strategy=strategy), log=lambda name, value, **_: logged.update({name: value})
    )
    log_loss(module, got, "val/")
    nats = float(want[0])
    assert logged == pytest.approx({"val/loss": nats / 51, "val/bpb": nats / math.log(2) / 51})
    logged.clear()
    log_loss(module, torch.tensor([nats, 51.0, 0.0]), "val/ema_")
    assert list(logged) == ["val/ema_loss"], "no text, no bits per byte"

"""Packed documents reach the model: its loss is that of documents kept apart, or not, as the data section says."""

from __future__ import annotations

import types

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.data.preparing.prepare import prepare
from hybridlm.machine.description import resolve_machine
from hybridlm.train import run as run_module
from hybridlm.train.resumed import planned


@pytest.mark.parametrize("isolate", [True, False], ids=["apart", "together"])
def test_the_training_step_sees_the_documents(tiny, corpus, isolate):
    config = compose_config(
        [
            *tiny,
            f"data.path={corpus}/lines.jsonl",
            "data.seq_len=700",
            "data.packing=true",
            f"data.isolate={str(isolate).lower()}",
        ]
    )
    plan = planned(config, None).plan
    config = plan.applied(config)
    machine, prepared = resolve_machine(config), prepare(config.data)
    data = run_module._datamodule(config, machine, prepared, val_batches=None)
    data.trainer = types.SimpleNamespace(global_rank=0, world_size=1)
    module = run_module._module(config, machine, prepared, {}, plan)
    module._trainer = types.SimpleNamespace(world_size=1, accumulate_grad_batches=1)
    module._fabric = None
    batch = next(iter(data.train_dataloader()))
    ids, targets, n_targets = batch["ids"], batch["targets"], batch["n_targets"]
    with torch.no_grad():
        step = module.training_step(batch, 0)
        apart, together = (
            module.model(ids, doc_ids=docs, targets=targets).loss_sum for docs in (batch.get("doc_ids"), None)
        )
    assert float(step["loss_sum"]) == pytest.approx(float(apart))
    assert float(step["loss"]) == pytest.approx(float(apart / n_targets))
    assert (float(apart) != pytest.approx(float(together))) == isolate
    assert int(n_targets) == int((targets >= 0).sum()) < targets.numel()

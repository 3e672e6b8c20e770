"""What a training start says of its plan, and what it refuses, each in a line that says what to do."""

from __future__ import annotations

import re

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.config.steps import never_reached
from hybridlm.errors import UserError
from hybridlm.memory.plan import plan_inference, plan_run
from hybridlm.memory.report import full_text, refusal, summary_lines
from hybridlm.memory.suggest import Change, Suggestion
from hybridlm.train.resumed import planned

TINY = ["model=transformer", "size=tiny", "data.seq_len=64", "data.source=synthetic"]


def test_two_short_lines_at_the_start():
    cut, memory = summary_lines(plan_run(compose_config([*TINY, "hardware=rtx4060"])))
    assert re.fullmatch(r"\d+ x \d+ x 1 \w+ of 64, no activation checkpointing", cut)
    assert re.fullmatch(
        r"planned [\d.]+ MiB of 7\.2 GiB; [\d.]+ MiB without the margin, mostly( [\w ]+ [\d.]+ [KMG]iB,?){3}",
        memory,
    )


def test_parts_then_their_sum_then_the_margin():
    config = compose_config([*TINY, "hardware=rtx4060"])
    lines = [line.partition("  ")[0] for line in full_text(plan_run(config), plan_inference(config)).splitlines()]
    peak = next(i for i, line in enumerate(lines) if line.startswith("peak ("))
    assert lines[peak - 1] == "workspace"
    assert lines[peak + 1 : peak + 5] == ["fragmentation (margin)", "peak with the margin", "available", "fits"]


@pytest.mark.parametrize(
    ("overrides", "global_batch", "accumulate"),
    [
        ([], 64, 1),
        (["data.batch_size=12"], 72, 6),
        (["data.batch_size=100"], 100, 1),
        (["trainer.accumulate=5"], 65, 5),
        (["data.batch_size=8", "trainer.accumulate=4"], 32, 4),
        (["data.batch_size=12", "trainer.devices=3"], 72, 2),
        (["trainer.devices=3"], 66, 1),
    ],
)
def test_an_automatic_global_batch_is_what_micro_batches_add_up_to(overrides, global_batch, accumulate):
    plan = planned(compose_config([*TINY, "hardware=rtx4060", "trainer.devices=1", *overrides]), None).plan
    assert (plan.global_batch, plan.accumulate) == (global_batch, accumulate)
    assert plan.batch_size * plan.accumulate * plan.devices == global_batch


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["optim.warmup=2000"],
            "optim.warmup = 2000: not below trainer.max_steps = 300 (auto, on CPU), so the learning rate never reaches",
        ),
        (["optim.warmup=0.999"], "optim.warmup = 0.999: not below trainer.max_steps = 300 (auto, on CPU)"),
        (["optim.schedule=wsd", "optim.decay=2000"], "= 0.05 + 2000: more than trainer.max_steps = 300 (auto, on CPU)"),
        (["optim.warmup=299"], None),
        (["optim.schedule=wsd", "optim.warmup=100", "optim.decay=200"], None),
        (["optim.schedule=cosine", "optim.decay=2000"], None),
    ],
)
def test_a_schedule_that_automatic_steps_do_not_reach_is_refused(overrides, said):
    config = compose_config([*TINY, "hardware=cpu", *overrides])  # no rule between fields is broken
    if said is None:
        planned(config, None)
        return
    with pytest.raises(UserError) as error:
        planned(config, None)
    (problem,) = error.value.problems
    assert said in problem


def test_what_a_short_run_leaves_out_is_one_line():
    asked = [
        "callbacks=early_stop",
        "callbacks.probes.every=2",
        "callbacks.samples.every=1",
        "trainer.guard.spike_sigma=6",
    ]
    base = [
        "model=transformer",
        "size=tiny",
        "trainer.val_every=100",
        "trainer.ckpt_every=100",
        *asked,
        "callbacks.early_stop.patience=2",
    ]
    every = {"trainer.val_every", "trainer.ckpt_every", "callbacks.samples.every", "trainer.guard.spike_window"}
    expected = {
        15: every | {"trainer.log_every", "callbacks.early_stop.patience", "callbacks.probes.every"},
        100: every | {"callbacks.early_stop.patience", "callbacks.probes.every"},
        199: {"callbacks.early_stop.patience", "callbacks.probes.every"},
        200: {"callbacks.early_stop.patience"},
        299: {"callbacks.early_stop.patience"},
    }
    for steps, fields in expected.items():
        line = never_reached(compose_config(base), steps)
        assert line.startswith(f"in {steps} steps there is no ")
        assert set(re.findall(r"\(([a-z_.]+)\)", line)) == fields
    assert never_reached(compose_config(base), 300) is None


def test_layers_that_are_not_there_are_not_counted():
    with pytest.raises(UserError) as error:
        compose_config([*TINY, "trainer.checkpoint_blocks=99"])
    (problem,) = error.value.problems
    assert re.fullmatch(
        r"trainer\.checkpoint_blocks = 99: the model has (\d+) layers; legal here: 0 to \1, or auto", problem
    )


def test_a_suggested_package_is_named_where_it_is_missing(monkeypatch):
    config = compose_config([*TINY, "hardware=rtx4060"])
    plan = plan_run(config)
    found = [
        Suggestion(Change((f"optim={name}",), config, same_model=True, values={}), 2**30, None, 1.0)
        for name in ("adamw8bit", "lion")
    ]
    monkeypatch.setattr("hybridlm.memory.report.find_spec", lambda name: None)
    eight_bit, lion = refusal(plan, found)[1:]
    assert eight_bit.startswith("fits with optim=adamw8bit: ")
    assert lion.startswith("fits with optim=lion: ")
    assert ("bitsandbytes" in eight_bit, "bitsandbytes" in lion) == (True, False)
    monkeypatch.setattr("hybridlm.memory.report.find_spec", lambda name: "a spec")
    assert "bitsandbytes" not in refusal(plan, found)[1]

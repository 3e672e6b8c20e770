"""What a training start says of its plan, and what it refuses, each in a line that says what to do."""

from __future__ import annotations

import re

import pytest

from hybridlm.compose import compose_config
from hybridlm.errors import UserError
from hybridlm.memory.plan import plan_inference, plan_run
from hybridlm.memory.report import full_text, refusal, summary_lines
from hybridlm.memory.suggest import Change, Suggestion
from hybridlm.train.planned import planned

TINY = ["model=transformer", "size=tiny", "data.seq_len=64", "data.source=synthetic"]


def test_two_short_lines_at_the_start():
    cut, memory = summary_lines(plan_run(compose_config([*TINY, "hardware=rtx4060"])))
    assert re.fullmatch(r"\d+ x \d+ x 1 windows of 64, no layer computed again", cut)
    assert re.fullmatch(r"planned [\d.]+ MiB of 7\.2 GiB; [\d.]+ MiB without the margin, most of it( [\w ]+ [\d.]+ [KMG]iB,?){3}", memory)


def test_parts_then_their_sum_then_the_margin():
    config = compose_config([*TINY, "hardware=rtx4060"])
    lines = [line.partition("  ")[0] for line in full_text(plan_run(config), plan_inference(config)).splitlines()]
    peak = next(i for i, line in enumerate(lines) if line.startswith("peak ("))
    assert lines[peak - 1] == "workspace"
    assert lines[peak + 1 : peak + 5] == ["fragmentation (margin)", "peak with the margin", "there is", "fits"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.batch_size=3"], "data.global_batch = 64: is not a multiple of data.batch_size (3) x devices (1)"),
        (
            ["data.batch_size=8", "trainer.accumulate=4"],
            "data.global_batch = 64: is not data.batch_size (8) x trainer.accumulate (4) x devices (1); leave one of them auto",
        ),
    ],
)
def test_a_batch_that_cannot_be_cut(overrides, said):
    """The profile's global batch, which no rule between fields knows."""
    with pytest.raises(UserError) as error:
        planned(compose_config([*TINY, "hardware=rtx4060", "data.global_batch=auto", "trainer.devices=1", *overrides]), None)
    assert error.value.problems == [said]


def test_layers_that_are_not_there_are_not_counted():
    with pytest.raises(UserError) as error:
        compose_config([*TINY, "trainer.checkpoint_blocks=99"])
    (problem,) = error.value.problems
    assert re.fullmatch(r"trainer\.checkpoint_blocks = 99: the model has (\d+) layers; legal here: 0 to \1, or auto", problem)


def test_a_suggested_package_is_named_where_it_is_missing(monkeypatch):
    config = compose_config([*TINY, "hardware=rtx4060"])
    plan = plan_run(config)
    found = [Suggestion(Change((f"optim={name}",), config, same_model=True), 2**30, None, 1.0) for name in ("adamw8bit", "lion")]
    monkeypatch.setattr("hybridlm.memory.report.find_spec", lambda name: None)
    assert refusal(plan, found)[1:] == [
        "fits with optim=adamw8bit: 1.0 GiB at the least; needs pip install bitsandbytes",
        "fits with optim=lion: 1.0 GiB at the least",
    ]
    monkeypatch.setattr("hybridlm.memory.report.find_spec", lambda name: "a spec")
    assert refusal(plan, found)[1].endswith("at the least")

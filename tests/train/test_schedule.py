"""The learning rate as a function of the step."""

from itertools import pairwise

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.config.optim import OptimConfig
from hybridlm.errors import UserError
from hybridlm.train.schedule import lr_factor, span


def factors(steps=100, **fields):
    config = OptimConfig(**fields)
    return [lr_factor(step, config, steps) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak():
    values = factors(warmup=10, schedule="constant")
    assert values[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert values[10:] == [1.0] * 90


def test_a_fraction_and_a_number_of_steps_agree():
    assert factors(warmup=0.2) == factors(warmup=20)
    assert span(0, 100) == 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_is_monotone_and_ends_at_the_final_rate(schedule):
    values = factors(warmup=10, schedule=schedule, final_lr=0.1)
    after = values[10:]
    assert after[0] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(after))
    assert lr_factor(100, OptimConfig(warmup=10, schedule=schedule, final_lr=0.1), 100) == pytest.approx(0.1)


def test_wsd_is_stable_and_then_falls_as_one_minus_a_root():
    """Hägele et al. 2024: 1 - sqrt((n - N_decay) / decay), here over 16 of 100 steps after 10 of warm-up."""
    values = factors(warmup=10, decay=16, schedule="wsd")
    assert values[9] == pytest.approx(10 / 11)
    assert values[10:85] == [1.0] * 75
    assert values[84:] == pytest.approx([1 - (i / 16) ** 0.5 for i in range(16)])
    assert values[88] == pytest.approx(0.5)
    assert values[93] == pytest.approx(0.25)
    assert factors(warmup=0.1, decay=0.16, schedule="wsd") == values
    ending = OptimConfig(warmup=10, decay=16, schedule="wsd", final_lr=0.2)
    assert lr_factor(88, ending, 100) == pytest.approx(0.6)
    assert lr_factor(100, ending, 100) == pytest.approx(0.2)
    assert lr_factor(90, OptimConfig(warmup=10, decay=16, schedule="wsd"), 200) == 1.0  # the same run, made longer


def test_a_decay_may_fill_all_steps_after_the_warmup():
    values = factors(steps=10, warmup=2, decay=8, schedule="wsd")
    assert values[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert values[3] == pytest.approx(1 - 8**-0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_a_run_of_one_step_and_a_step_past_the_end_have_a_rate(schedule):
    for steps in (1, 2, 3):
        assert all(0 <= lr_factor(step, OptimConfig(schedule=schedule), steps) <= 1 for step in range(5))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["optim.warmup=100", "trainer.max_steps=50"], "optim.warmup = 100: not below trainer.max_steps = 50"),
        (["optim.warmup=1.0"], "optim.warmup = 1: a share of max_steps is below 1"),
        (["optim.schedule=wsd", "optim.decay=1.5"], "optim.decay = 1.5: a share of max_steps is below 1"),
        (
            ["optim.schedule=wsd", "optim.warmup=0.5", "optim.decay=0.6"],
            "optim.warmup + optim.decay = 0.5 + 0.6: longer than the run",
        ),
        (
            ["optim.schedule=wsd", "optim.warmup=30", "optim.decay=30", "trainer.max_steps=50"],
            "optim.warmup + optim.decay = 30 + 30: more than trainer.max_steps = 50",
        ),
        (["optim=sgd", "optim.sgd.momentum=0", "optim.sgd.nesterov=true"], "optim.sgd.nesterov = true"),
        (["optim=adamw8bit", "hardware=cpu"], "adamw, muon, lion or sgd"),
        (["optim=adamw8bit", "trainer.strategy=fsdp2"], "optim=adamw or strategy=ddp"),
        (["trainer.precision=bf16-true", "trainer.strategy=fsdp2"], "bf16-mixed or ddp"),
        (["trainer.precision=bf16-true", "hardware=rtx3070", "hardware.bf16=false"], "auto, 32-true or 16-mixed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_schedules_are_refused_with_the_legal_range(settings, problem):
    with pytest.raises(UserError) as refused:
        compose_config(settings)
    assert len(refused.value.problems) == 1
    assert problem in refused.value.problems[0]


def test_settings_of_an_unused_schedule_are_not_checked():
    compose_config(["optim.schedule=linear", "optim.warmup=0.5", "optim.decay=0.9"])
    compose_config(["optim.schedule=wsd", "optim.warmup=10", "optim.decay=40", "trainer.max_steps=50"])


def test_half_way_values():
    assert lr_factor(50, OptimConfig(warmup=0, schedule="linear"), 100) == pytest.approx(0.5)
    assert lr_factor(25, OptimConfig(warmup=0, schedule="cosine"), 100) == pytest.approx(0.853553, abs=1e-6)

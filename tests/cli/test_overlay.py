"""New overrides on a recorded configuration: what they change, and that the record is values and nothing else."""

from __future__ import annotations

import pytest

from hybridlm.cli.compose import compose_config, composed
from hybridlm.cli.overlay import overlaid
from hybridlm.config.groups import groups
from hybridlm.config.load import from_yaml, to_yaml
from hybridlm.config.overrides import CommandLine, repair
from hybridlm.errors import UserError

GIVEN = [
    "model=transformer",
    "size=tiny",
    "optim=adamw",
    "optim.lr=0.5",
    "trainer.max_steps=40",
    "callbacks=early_stop",
    "seed=7",
]


def over(recorded, *overrides):
    line = CommandLine((), tuple(repair(overrides, groups())))
    return overlaid(recorded, line, composed(line))


def overlay(*overrides):
    recorded = from_yaml(to_yaml(compose_config(GIVEN)))
    return recorded, over(recorded, *overrides)


def test_what_is_not_named_stays_as_it_was():
    recorded, same = overlay()
    assert same == recorded
    assert (recorded.data.batch_size, recorded.trainer.accumulate) == ("auto", "auto")
    assert overlay(*GIVEN)[1] == recorded, "the command line of before gives what it gave before"
    assert overlay("hydra.run.dir=x", "hydra/launcher=basic", "ckpt=auto")[1] == recorded


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["trainer.max_steps=auto", "seed=0"], {"trainer.max_steps": "auto", "seed": 0}),  # defaults of conf/
        (["data.batch_size=8"], {"data.batch_size": 8}),
        (
            ["callbacks.samples.prompts=['${seed}x','b']"],
            {"callbacks.samples.prompts": ("0x", "b")},
        ),  # Hydra's power over what it composes
        (["~trainer.val_every"], {"trainer.val_every": 200}),
        (["optim=adamw"], {"optim.lr": compose_config(["optim=adamw"]).optim.lr}),
        (["callbacks=none"], {"callbacks.early_stop.patience": None, "callbacks.samples.prompts": ()}),
        (["~callbacks"], {"callbacks.early_stop.patience": None, "callbacks.samples.prompts": ()}),
        (
            ["callbacks=ema", "callbacks.ema.decay=0.5"],
            {"callbacks.early_stop.patience": None, "callbacks.ema.decay": 0.5},
        ),
        (
            ["model.variants={S: {mixer: attention, window: 8}}"],
            {"model.variants": {"S": {"mixer": "attention", "window": 8}}},
        ),
    ],
    ids=str,
)
def test_what_is_named_changes(overrides, changes):
    recorded, changed = overlay(*overrides)
    for path, value in changes.items():
        found = changed
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value, path
    sections = {path.partition(".")[0] for path in changes}
    assert {
        name for name in type(recorded).model_fields if getattr(recorded, name) != getattr(changed, name)
    } == sections


def test_an_experiment_changes_what_it_sets():
    recorded, changed = overlay("experiments=smoke")
    smoke = compose_config(["experiments=smoke"])
    assert (changed.trainer.max_steps, changed.size.name) == (smoke.trainer.max_steps, "tiny")
    assert (changed.optim, changed.seed) == (recorded.optim, 7)


def test_the_entries_of_a_mapping_are_merged():
    base = compose_config(
        ["data=mixture", "data.parts={a: {source: stdlib}, b: {source: files, path: b.txt, weight: 2.0}}"]
    )
    changed = over(base, "++data.parts.b.weight=3")
    assert (changed.data.parts["b"].weight, changed.data.parts["b"].path, changed.data.parts["a"].source) == (
        3,
        "b.txt",
        "stdlib",
    )


@pytest.mark.parametrize("override", ["model.patern=T", "optim=adam", "data.batch_size=0", "optim.lr=1,2"])
def test_mistakes_are_the_same_as_in_a_new_run(override):
    with pytest.raises(UserError) as there:
        compose_config([override])
    with pytest.raises(UserError) as here:
        overlay(override)
    assert here.value.problems == there.value.problems


def test_a_reference_in_the_record_stays_text(monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    text = to_yaml(compose_config(GIVEN)).replace("prompts:\n", "prompts:\n    - ${oc.env:SECRET} ${seed}\n", 1)
    recorded = from_yaml(text)
    changed = over(recorded, "++trainer.max_steps=3", "callbacks=ema", "~optim")
    kept = over(recorded, "++trainer.max_steps=3")
    assert "s3cret" not in to_yaml(changed) + to_yaml(kept)
    assert kept.callbacks.samples.prompts[0] == "${oc.env:SECRET} ${seed}"

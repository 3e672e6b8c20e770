"""From a command line to jobs: the grid, its order, names, and everything that is refused before the first job."""

from __future__ import annotations

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.cli.composition import sweep_axes
from hybridlm.errors import UserError
from hybridlm.sweep.expand import depth_warning, expand

BASE = ["model=hybrid_alternating", "size=tiny"]


def planned(*overrides, seeds=1, gpu=False):
    return expand(sweep_axes([*BASE, *overrides]), seeds, compose_config, gpu=gpu, group="g")


def problems(*overrides, seeds=1, gpu=False):
    with pytest.raises(UserError) as caught:
        planned(*overrides, seeds=seeds, gpu=gpu)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "values"),
    [
        (
            "model.pattern=T,(TM)*2,[T,M]",
            ['++model.pattern="T"', '++model.pattern="(TM)*2"', '++model.pattern=["T","M"]'],
        ),
        ("seed=range(0,3)", ["++seed=0", "++seed=1", "++seed=2"]),
        ("optim.lr=choice(1e-3,3e-3)", ["++optim.lr=0.001", "++optim.lr=0.003"]),
        ("optim=glob(ad*)", ["optim=adamw", "optim=adamw8bit"]),
        ("size=tiny,small", ["size=tiny", "size=small"]),
        ("optim.lr=interval(0,1)", []),
        ("seed=7", ["++seed=7"]),
    ],
)
def test_axes_are_read_by_hydras_grammar(override, values):
    (axis,) = sweep_axes([override])
    assert (axis.key, list(axis.values), axis.varied) == (override.partition("=")[0], values, override != "seed=7")


def test_every_point_has_its_first_seed_before_any_has_its_second():
    jobs = [item.job for item in planned("model.pattern=T,T*12 M*8,MMMT", "optim=adamw,muon", seeds=2)]
    assert [job.number for job in jobs] == list(range(1, 13))
    assert [job.seed for job in jobs] == [0] * 6 + [1] * 6
    assert [job.point for job in jobs[:6]] == [job.point for job in jobs[6:]]
    assert jobs[2].point == {"model.pattern": "T*12 M*8", "optim": "adamw"}
    assert jobs[2].name == "T12M8-adamw-s0"
    assert jobs[8].overrides[-1] == "++seed=1"
    assert len({job.name for job in jobs}) == 12


def test_seeds_are_counted_from_the_configurations_own_or_listed():
    assert [item.job.seed for item in planned("seed=5", "optim.lr=1e-3,1e-2", seeds=2)] == [5, 5, 6, 6]
    assert [item.config.seed for item in planned("seed=5", seeds=2)] == [5, 6]
    listed = planned("seed=3,1", "optim.lr=1e-3,1e-2")
    assert [item.job.seed for item in listed] == [3, 3, 1, 1]
    assert [item.job.name for item in listed] == ["lr0.001-s3", "lr0.01-s3", "lr0.001-s1", "lr0.01-s1"]
    assert [item.job.point for item in listed][:1] == [{"optim.lr": "0.001"}]
    (alone,) = planned()
    assert (alone.job.name, alone.job.point, alone.job.seed) == ("hybrid_alternating", {}, 0)


def test_names_fit_a_file_system():
    item = planned("data=files", "data.path=/a b/*.txt,/c", f"model.pattern={'TM' * 200},T")[0]
    assert item.job.name == "ab.txt-" + "TM" * 10
    assert item.job.point["data.path"] == "/a b/*.txt"
    assert item.config.data.path == "/a b/*.txt"


def test_the_last_value_of_a_key_counts():
    assert [item.job.point for item in planned("optim.lr=1,2", "optim.lr=3,4")] == [
        {"optim.lr": "3"},
        {"optim.lr": "4"},
    ]
    assert len(planned("optim.lr=1,2", "optim.lr=3")) == 1


def test_a_job_is_in_the_sweeps_group_of_wandb():
    (plain,), (grouped,), (named,) = planned(), planned("logger=wandb"), planned("logger=wandb", "logger.group=mine")
    assert not [line for line in plain.job.overrides if "logger" in line]
    assert grouped.job.overrides[-2:] == ("++logger.group='g'", "++logger.job_type='sweep'")
    assert [line for line in named.job.overrides if "group" in line] == ["++logger.group=mine"]


def test_every_wrong_point_is_listed():
    assert problems("optim.lr=1,a", "trainer.max_steps=x", "model.pattern=T,M") == [
        "trainer.max_steps = 'x': expected an integer >= 1 or 'auto' (at all 4 points)",
        "optim.lr = 'a': expected a number > 0 (at optim.lr=a model.pattern=T; optim.lr=a model.pattern=M)",
    ]
    (found,) = problems("model.pattern=TX,T", "optim.lr=1,2,3,4")
    assert "'X'" in found
    at = "; ".join(f"model.pattern=TX optim.lr={lr}" for lr in (1, 2, 3))
    assert found.endswith(f"(at {at} and 1 more)")
    assert problems("seed=0,1,2,3,4,-1", "optim.lr=1,2,3,4,x") == [
        "optim.lr = 'x': expected a number > 0 (at optim.lr=x)"
    ]


@pytest.mark.parametrize(
    ("overrides", "seeds", "part"),
    [
        (["ckpt=last"], 1, "--resume FOLDER"),
        (["hydra.run.dir=x"], 1, "hydra.run.dir: not allowed"),
        (["hydra/launcher=joblib"], 1, "python train.py -m"),
        (["hydra.sweep.dir=a,b"], 1, "hydra.sweep.dir: a sweep has one folder"),
        (["optim.lr=interval(0,1)"], 1, "optim.lr: needs a list of values"),
        (["seed=1,2"], 3, "--seeds 3"),
        (["hardware=rtx3070"], 1, "needs a CUDA device"),
        (["model=hybird,transformer"], 1, "did you mean model=hybrid"),
        (["seed=1,-2"], 1, "seed = -2: expected an integer >= 0"),
        (["seed=4294967294"], 3, "seed = 4294967296: expected an integer >= 0 and <= 4294967295"),
        (["seed=1,0,1"], 1, "seed: 1 is listed twice"),
        (["optim.lr=1e-3,0.001"], 1, "optim.lr: 0.001 is listed twice"),
        (["model.pattern='TM',TM"], 1, "model.pattern: TM is listed twice"),
    ],
)
def test_overrides_that_a_sweep_refuses(overrides, seeds, part):
    given = [line for line in BASE if not overrides[0].startswith("model=") or not line.startswith("model=")]
    with pytest.raises(UserError) as caught:
        expand(sweep_axes([*given, *overrides]), seeds, compose_config, gpu=False, group="g")
    assert len(caught.value.problems) == 1
    assert part in caught.value.problems[0]


def test_matching_patterns_of_different_depth_warns():
    uneven = ["model.n_layers=null", "sweep.match=params", "model.pattern=T,TM"]
    assert "1, 2 layers" in (depth_warning(planned(*uneven)) or "")
    assert depth_warning(planned(*uneven, "sweep.target=100000")) is None
    assert depth_warning(planned(*uneven, "model.n_layers=4")) is None
    assert depth_warning(planned("sweep.match=params", "model.pattern=T,TM", "size=tiny,small")) is None
    presets = ["model=hybrid_alternating,hybrid_strategic", "size=default", "sweep.match=params"]
    assert "8, 19 layers" in (depth_warning(planned(*presets)) or "")

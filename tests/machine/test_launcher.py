"""torchrun and srun: how many processes there are, one folder for all of them, and what cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.cli.start import main
from hybridlm.errors import UserError
from hybridlm.machine.description import resolve_machine
from hybridlm.machine.launcher import (
    Launch,
    alone_with,
    child_environment,
    folder_overrides,
    is_child,
    is_first_rank,
    launch,
    local_rank,
)
from hybridlm.runs.resume import requeued
from hybridlm.runs.run_folder import RunFolder

TRAIN = Path(__file__).parents[2] / "train.py"
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "abc",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[03-04,7],m1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SCRIPT = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}  # of a job, outside srun
OTHERS = ["NODE_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE", "HYBRIDLM_RANK", "SLURM_NTASKS"]


@pytest.fixture
def started(monkeypatch):
    """Pretends that a launcher has started this process."""

    def start(variables: dict[str, str]) -> None:
        for name in (*TORCHRUN, *SRUN, *OTHERS):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    start({})
    return start


def test_what_a_launcher_says_of_its_processes(started):
    assert launch() is None
    assert is_first_rank()
    started(TORCHRUN)
    assert launch() == Launch("torchrun", 2, 2, rank=3, local_rank=1, node_rank=1, address="head", port=29500, id="abc")
    assert (is_first_rank(), local_rank()) == (False, 1)
    started({name: value for name, value in TORCHRUN.items() if "TORCHELASTIC" not in name and "GROUP" not in name})
    assert launch() == Launch(
        "RANK and WORLD_SIZE", 2, 2, rank=3, local_rank=1, node_rank=1, address="head", port=29500, id=None
    )
    started(SRUN)
    first = launch()
    assert first == Launch("srun", 2, 3, rank=0, local_rank=0, node_rank=0, address="gpu03", port=first.port, id="77.1")
    started({**SRUN, "SLURM_STEP_ID": "2"})
    assert launch().port != first.port, "two steps of a job run at once"
    started(
        {
            **SRUN,
            "SLURM_PROCID": "5",
            "SLURM_LOCALID": "1",
            "SLURM_NODEID": "2",
            "MASTER_ADDR": "head",
            "MASTER_PORT": "1234",
        }
    )
    assert launch() == Launch("srun", 2, 3, rank=5, local_rank=1, node_rank=2, address="head", port=1234, id="77.1")
    started({**SRUN, "SLURM_STEP_NUM_NODES": "1"})
    assert launch().address == "127.0.0.1"


def test_what_stands_alone(started):
    one = {
        **TORCHRUN,
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
    }
    step = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    for variables in (
        SCRIPT,
        one,
        step,
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"MASTER_PORT": "29500", "MASTER_ADDR": "elsewhere"},
        {"RANK": ""},
        {"RANK": "1", "LOCAL_RANK": "1"},  # left over from something else
        {"NODE_RANK": "1"},
        {**SCRIPT, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
        {**SCRIPT, "SLURM_STEP_ID": "0", "PMI_SIZE": "2"},
    ):
        started(variables)
        assert launch() is None, variables
        assert (is_first_rank(), local_rank()) == (True, 0)


def test_the_variables_that_a_script_derives_from_those_of_srun_may_stay(started):
    started({**SRUN, "RANK": "0", "WORLD_SIZE": "6", "LOCAL_RANK": "0", "NODE_RANK": "0"})
    assert launch().name == "srun"
    started({**SRUN, **TORCHRUN})  # torchrun in each task
    assert launch().name == "torchrun"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE = 2, but LOCAL_RANK, .*MASTER_ADDR, .* not set: .*, or unset WORLD_SIZE$"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, r"WORLD_SIZE = 2, but .*LOCAL_RANK.* not set: .*"),
        ({"LOCAL_WORLD_SIZE": "2"}, r"LOCAL_WORLD_SIZE = 2, but .*WORLD_SIZE not set"),
        ({**TORCHRUN, "RANK": "4"}, r"torchrun: rank 4 of 4"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, r"torchrun: local rank 2 of 2"),
        ({**TORCHRUN, "RANK": "-1"}, r"RANK = '-1': expected a number"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, r"WORLD_SIZE = 'four': expected a number"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, r"torchrun: port 70000 of 65536"),
        (
            {**TORCHRUN, "WORLD_SIZE": "5"},
            r"torchrun started 5 processes on 2 nodes",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            r"SLURM_STEP_NUM_TASKS = 2, but SLURM_PROCID, .* not set: .*; unset SLURM_STEP_NUM_TASKS$",
        ),
        ({**SRUN, "SLURM_PROCID": "6"}, r"srun: rank 6 of 6"),
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "7"},
            r"srun started 7 processes on 3 nodes",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"OMPI_COMM_WORLD_SIZE = 2, .*each process would train on its own"),
        ({"HYBRIDLM_RANK": "1"}, r"HYBRIDLM_RANK = '1': .*; unset it$"),
        (
            {"HYBRIDLM_RANK": '{"rank": 1, "processes": 2, "port": 5, "parent": 1}'},
            r"HYBRIDLM_RANK: process 1, .*; unset it$",
        ),
    ],
)
def test_part_of_a_launchers_variables_is_refused_by_name(started, variables, says):
    started(variables)
    with pytest.raises(UserError, match=says) as caught:
        launch()
    assert "\n" not in str(caught.value)


def test_a_child_knows_its_place(started):
    first = replace(alone_with(3), port=5)
    started(child_environment(first, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridlm.machine.launcher.os.getppid", lambda: os.getpid())
        assert launch() == Launch(
            "trainer.devices", 3, 1, rank=2, local_rank=2, node_rank=0, address="127.0.0.1", port=5, id=None
        )
        assert is_child()


def test_a_run_is_refused_before_anything_is_written(started, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started({"WORLD_SIZE": "2"})
    with pytest.raises(SystemExit) as ended:
        main([*tiny, "hydra.run.dir=a"])
    assert ended.value.code == 2
    assert not list(tmp_path.iterdir())


def test_all_processes_of_a_launch_share_a_folder(started):
    assert folder_overrides(None, []) == []
    first, other = (Launch("torchrun", 2, 1, rank, rank, 0, "head", 29500, "abc") for rank in (0, 1))
    assert folder_overrides(first, ["seed=1"]) == ["hydra.run.dir=outputs/torchrun-abc"]
    assert folder_overrides(other, []) == ["hydra.run.dir=outputs/torchrun-abc"]
    assert folder_overrides(other, ["hydra.run.dir=here"]) == []
    with pytest.raises(UserError, match=r"hydra\.run\.dir: set it"):
        folder_overrides(replace(first, id=None), [])


def test_the_global_batch_is_that_of_all_nodes(started, tiny):
    config = compose_config([*tiny, "data.global_batch=12"])
    started(SRUN)
    machine = resolve_machine(config)
    assert (machine.devices, machine.nodes, machine.batch_size * machine.accumulate) == (6, 3, 2)
    with pytest.raises(UserError, match=r"trainer\.devices = 3: srun started 2 processes per node"):
        resolve_machine(compose_config([*tiny, "data.global_batch=12", "trainer.devices=3"]))


def test_a_sweep_under_a_launcher_is_refused(tiny, tmp_path, environment):
    done = subprocess.run(
        [sys.executable, str(TRAIN), "-m", *tiny, "seed=1,2"],
        cwd=tmp_path,
        env={**environment, **TORCHRUN},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: -m: each process of torchrun would run the whole sweep")


@pytest.mark.slow
def test_torchrun_starts_one_run(tiny, tmp_path, environment):
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(TRAIN),
        *tiny,
        "trainer.headless=true",
    ]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "outputs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12
    assert done.stdout.count('"run folder') == 1
    assert "2 process(es)" in done.stdout


@pytest.mark.slow
def test_a_sweep_over_two_patterns_on_two_ranks_is_two_right_runs(tiny, tmp_path, environment):
    """As each is by itself on one rank."""
    base = [
        *[item for item in tiny if not item.startswith("model.pattern=")],
        "optim=adamw",
        "optim.eps=1e-3",
        "trainer.log_every=1",
    ]
    for folder, more in (("two", ["trainer.devices=2"]), ("one", [])):
        line = [
            sys.executable,
            str(TRAIN),
            "-m",
            *base,
            *more,
            "model.pattern=T,MT",
            f"hydra.sweep.dir={tmp_path}/{folder}",
        ]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    for job in ("0", "1"):
        two, one = (
            [
                json.loads(row).get("train/loss")
                for row in (tmp_path / folder / job / "metrics.jsonl").read_text().splitlines()
            ]
            for folder in ("two", "one")
        )
        assert len(two) == 12
        assert two == pytest.approx(one, rel=1e-5)
    assert {path.name for path in (tmp_path / "two").iterdir() if path.is_dir()} == {"0", "1"}


def test_a_job_that_is_queued_again_is_known(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not requeued(folder)
    folder.claim("seed: 0\n")
    assert requeued(folder)
    folder.claim("seed: 1\n", anew=True)  # nothing was saved: it starts anew in its folder
    assert folder.config.read_text() == "seed: 1\n"
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert not requeued(folder)

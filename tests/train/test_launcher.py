"""torchrun and srun: how many processes there are, one folder for all of them, and what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlm.compose import compose_config
from hybridlm.errors import UserError
from hybridlm.hardware.machine import resolve_machine
from hybridlm.launcher import Launch, folder_overrides, is_first_rank, launch
from hybridlm.resume import requeued
from hybridlm.run_folder import RunFolder

TRAIN = Path(__file__).parents[2] / "train.py"
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "abc",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "RANK": "3",
    "LOCAL_RANK": "1",
}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1"}


@pytest.fixture
def started(monkeypatch):
    """Pretends that a launcher has started this process."""

    def start(variables: dict[str, str]) -> None:
        for name in (*TORCHRUN, *SRUN):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    start({})
    return start


def test_what_a_launcher_says_of_its_processes(started):
    assert launch() is None
    assert is_first_rank()
    started(TORCHRUN)
    assert launch() == Launch("torchrun", per_node=2, nodes=2, rank=3, id="abc")
    assert not is_first_rank()
    started(SRUN)
    assert launch() == Launch("srun", per_node=2, nodes=3, rank=0, id="77.1")
    started({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "6", "SLURM_PROCID": "0"})  # the script of a job, outside srun
    assert launch() is None
    started({**TORCHRUN, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1", "RANK": "0"})
    assert launch() is None
    started({**SRUN, "SLURM_STEP_NUM_TASKS": "7"})
    with pytest.raises(UserError, match="srun started 7 processes on 3 nodes: legal is the same number on every node"):
        launch()


def test_all_processes_of_a_launch_share_a_folder(started):
    assert folder_overrides(None, []) == []
    first, other = (Launch("torchrun", 2, 1, rank, "abc") for rank in (0, 1))
    assert folder_overrides(first, ["seed=1"]) == ["hydra.run.dir=outputs/torchrun-abc"]
    assert folder_overrides(other, []) == ["hydra.run.dir=outputs/torchrun-abc", "hydra.output_subdir=null"]
    assert folder_overrides(other, ["hydra.run.dir=here"]) == ["hydra.output_subdir=null"]
    with pytest.raises(UserError, match=r"hydra\.run\.dir: name the run's folder"):
        folder_overrides(Launch("torchrun", 2, 1, 0, None), [])


def test_the_global_batch_is_that_of_all_nodes(started, tiny):
    config = compose_config([*tiny, "data.global_batch=12"])
    started(SRUN)
    machine = resolve_machine(config)
    assert (machine.devices, machine.nodes, machine.batch_size * machine.accumulate) == (6, 3, 2)
    with pytest.raises(UserError, match=r"trainer\.devices = 3: srun started 2 processes per node; leave it auto"):
        resolve_machine(compose_config([*tiny, "data.global_batch=12", "trainer.devices=3"]))


def test_a_sweep_under_a_launcher_is_refused(tiny, tmp_path, environment):
    done = subprocess.run(
        [sys.executable, str(TRAIN), "-m", *tiny, "seed=1,2"], cwd=tmp_path, env={**environment, **TORCHRUN}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: -m: each process of torchrun would run the whole sweep")


@pytest.mark.slow
def test_torchrun_starts_one_run(tiny, tmp_path, environment):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TRAIN), *tiny, "trainer.headless=true"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "outputs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12
    assert done.stdout.count('"run folder') == 1
    assert "2 process(es)" in done.stdout


@pytest.mark.slow
def test_a_sweep_over_two_patterns_on_two_ranks_is_two_right_runs(tiny, tmp_path, environment):
    """As each is by itself on one rank."""
    base = [*[item for item in tiny if not item.startswith("model.pattern=")], "optim=adamw", "optim.eps=1e-3", "trainer.log_every=1"]
    for folder, more in (("two", ["trainer.devices=2"]), ("one", [])):
        line = [sys.executable, str(TRAIN), "-m", *base, *more, "model.pattern=T,MT", f"hydra.sweep.dir={tmp_path}/{folder}"]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    for job in ("0", "1"):
        two, one = (
            [json.loads(row).get("train/loss") for row in (tmp_path / folder / job / "metrics.jsonl").read_text().splitlines()]
            for folder in ("two", "one")
        )
        assert len(two) == 12
        assert two == pytest.approx(one, rel=1e-5)
    assert {path.name for path in (tmp_path / "two").iterdir() if path.is_dir()} == {"0", "1"}


def test_a_sweep_of_slurm_jobs_needs_a_cluster(tiny, tmp_path, environment):
    arguments = ["-m", *tiny, "seed=1,2", "hydra/launcher=slurm"]
    done = subprocess.run([sys.executable, str(TRAIN), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "config error: hydra/launcher=slurm: there is no srun on this machine; start the sweep from a cluster's login node"
    ]


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

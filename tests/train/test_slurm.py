"""On a real SLURM of two nodes (tests/slurm_cluster.py): how jobs start, are told to end, come again, and what must not
come again.

Every row twice: both processes on one node, and one on each of two.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_ends import assert_same_end, rows

from hybridlm.runs.run_folder import RunFolder, step_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from slurm_cluster import Cluster, cluster, kill_node, missing, start_node

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
TRAIN = Path(__file__).parents[2] / "train.py"
NODES = {1: ["--nodes=1", "--ntasks=2"], 2: ["--nodes=2", "--ntasks=2"]}
SRUN = "srun --kill-on-bad-exit=1"  # as docs/clusters.md has it
both = pytest.mark.parametrize("nodes", NODES)
# Long enough to be caught in the middle, and nothing saved but at the end.
STEPS = 400
LONG = [
    f"trainer.max_steps={STEPS}",
    "trainer.val_every=null",
    "trainer.ckpt_every=1000000",
    "trainer.log_every=1",
    "trainer.keep_last=100",
]
LONG += ["optim=adamw", "optim.schedule=constant", "optim.warmup=0"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    cache = str(folder / "cache")
    with cluster(
        folder, {**os.environ, "OMP_NUM_THREADS": "1", "HYBRIDLM_CACHE": cache, "WANDB_MODE": "disabled"}
    ) as made:
        yield made


@pytest.fixture
def here(slurm, tmp_path):
    """The cluster, used from a folder of this test's own, in which no job is left afterwards."""
    yield Cluster(tmp_path, slurm.environment, slurm.daemons)
    slurm.run("scancel", "--user=root", "--signal=KILL", "--full")
    slurm.run("scancel", "--user=root")
    deadline = time.monotonic() + 60
    while slurm.run("squeue", "-h").stdout.strip():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def train(tiny):
    """``train(...)``: the command of a run with these overrides more."""
    return lambda *more: shlex.join([sys.executable, str(TRAIN), *tiny, *more])


def logged(folder: Path) -> int:
    """Steps in metrics.jsonl."""
    path = RunFolder(folder).metrics_jsonl
    return path.read_text().count("\n") if path.exists() else 0


def saved(folder: Path) -> int:
    return max((step_of(path) for path in RunFolder(folder).step_checkpoints()), default=0)


def noted(here: Cluster, command: str) -> str:
    """The script of a job whose tasks can be killed with ``kill_task``."""
    (here.folder / "task.sh").write_text(f"echo $SLURM_PROCID $SLURMD_NODENAME $$ >> tasks\nexec {command}\n")
    return "srun bash task.sh"


def kill_task(here: Cluster, job: str, rank: int) -> None:
    """By SIGKILL alone; scancel would send SIGTERM before."""
    tasks = [line.split() for line in (here.folder / "tasks").read_text().splitlines()]
    ((_, node, process),) = [task for task in tasks if task[0] == str(rank)]
    here.run("srun", f"--jobid={job}", "--overlap", "-N1", "-n1", "-w", node, "kill", "-9", process)


def assert_one_run(folder: Path, log: str, steps: int = 12) -> None:
    assert json.loads(RunFolder(folder).summary.read_text())["steps"] == steps, log[-3000:]
    assert json.loads(RunFolder(folder).summary.read_text())["devices"] == 2
    assert log.count("run folder ") == 1
    assert "Traceback" not in log
    assert [row["step"] for row in rows(RunFolder(folder))] == sorted({row["step"] for row in rows(RunFolder(folder))})


@both
@pytest.mark.parametrize(
    "request_",
    [
        ["--ntasks=2"],
        ["--ntasks-per-node=2", "srun -N2 -n2"],
        ["--ntasks=2", "--job-name=bash"],
        ["--ntasks=2", "--job-name=interactive"],
    ],
    ids=["ntasks", "srun_other_than_the_job", "name_bash", "name_interactive"],
)
def test_srun_starts_one_run_whatever_the_job_asked_for(here, train, nodes, request_):
    options = [option for option in request_ if option.startswith("--")]
    srun = f"srun -N{nodes} -n2" if len(options) < len(request_) else "srun"
    job = here.submit(f"{srun} {train('hydra.run.dir=a')}", f"--nodes={nodes}", *options)
    assert here.ended(job)["JobState"] == "COMPLETED", here.log(job)[-3000:]
    assert_one_run(here.folder / "a", here.log(job))


@both
def test_salloc_then_srun_is_one_run(here, train, nodes):
    done = here.run("salloc", *NODES[nodes], "bash", "-c", f"srun {train('hydra.run.dir=a')}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_one_run(here.folder / "a", done.stdout)


@both
def test_two_steps_of_a_job_run_at_once(here, train, nodes):
    step = f"srun --exact --overlap -N{nodes} -n2"
    script = f"{step} {train()} > one 2>&1 & {step} {train()} > two 2>&1 & wait -n && wait -n"
    job = here.submit(script, *NODES[nodes])
    facts, logs = here.ended(job), [(here.folder / name).read_text() for name in ("one", "two")]
    assert facts["JobState"] == "COMPLETED", "\n".join(logs)[-5000:]
    folders = sorted((here.folder / "outputs").iterdir())
    assert [folder.name for folder in folders] == [f"srun-{job}.0", f"srun-{job}.1"]
    for folder in folders:
        assert_one_run(folder, next(log for log in logs if folder.name in log))


def test_a_script_with_plain_python_starts_the_other_process_itself(here, train):
    job = here.submit(train("hydra.run.dir=a", "trainer.devices=2"), "--ntasks=2")
    assert here.ended(job)["JobState"] == "COMPLETED", here.log(job)[-3000:]
    assert_one_run(here.folder / "a", here.log(job))


@both
def test_a_notice_saves_queues_again_and_the_end_is_that_of_an_unbroken_run(here, train, nodes):
    settings = [*LONG, "trainer.requeue=true", "ckpt=auto"]
    job = here.submit(f"{SRUN} {train(*settings, 'hydra.run.dir=a')}", *NODES[nodes])
    here.wait(lambda: logged(here.folder / "a") >= 3, job)
    here.run("scancel", "--signal=USR1", job)
    assert here.ended(job, restarts=1)["JobState"] == "COMPLETED", here.log(job)[-3000:]
    assert f"job {job} is requeued" in here.log(job)
    whole = here.submit(f"srun {train(*settings, 'hydra.run.dir=b')}", *NODES[nodes])
    assert here.ended(whole)["JobState"] == "COMPLETED", here.log(whole)[-3000:]
    assert_same_end(RunFolder(here.folder / "a"), RunFolder(here.folder / "b"), STEPS)
    assert "Traceback" not in here.log(job)


@both
def test_a_cancelled_job_is_saved_and_stays_cancelled(here, train, nodes):
    job = here.submit(f"srun {train(*LONG, 'trainer.requeue=true', 'ckpt=auto', 'hydra.run.dir=a')}", *NODES[nodes])
    here.wait(lambda: logged(here.folder / "a") >= 3, job)
    here.run("scancel", job)
    facts = here.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    here.wait(lambda: saved(here.folder / "a"), job, 30)


@both
def test_a_preempted_job_is_saved_and_goes_on(here, train, nodes):
    """SLURM sends SIGTERM, SIGCONT and SIGTERM at once, and queues the job again by itself."""
    job = here.submit(f"srun {train(*LONG, 'ckpt=auto', 'hydra.run.dir=a')}", "--exclusive", "--requeue", *NODES[nodes])
    here.wait(lambda: logged(here.folder / "a") >= 3, job)
    other = here.submit("sleep 5", "--partition=high", "--exclusive", "--nodes=2")
    here.wait(lambda: saved(here.folder / "a"), job, 60)
    stopped_at = saved(here.folder / "a")
    assert here.ended(other)["JobState"] == "COMPLETED"
    assert here.ended(job, restarts=1)["JobState"] == "COMPLETED", here.log(job)[-3000:]
    assert f"resuming after step {stopped_at}" in here.log(job)
    assert [row["step"] for row in rows(RunFolder(here.folder / "a"))] == list(range(1, STEPS + 1))


@both
def test_a_notice_while_a_job_starts_queues_it_again(here, train, nodes):
    command = train("trainer.requeue=true", "ckpt=auto", "hydra.run.dir=a")
    (here.folder / "task.sh").write_text(f"touch begun.$SLURM_PROCID\nexec {command}\n")
    job = here.submit(f"{SRUN} bash task.sh", *NODES[nodes])
    here.wait(lambda: all((here.folder / f"begun.{rank}").exists() for rank in (0, 1)), job)
    time.sleep(2)  # within the imports
    here.run("scancel", "--signal=USR1", job)
    assert here.ended(job, restarts=1)["JobState"] == "COMPLETED", here.log(job)[-3000:]
    assert f"job {job} is requeued" in here.log(job)
    assert "138" not in here.log(job)
    assert_one_run(here.folder / "a", here.log(job))


@both
def test_a_job_that_was_killed_before_its_first_checkpoint_begins_anew(here, train, nodes):
    script = noted(here, train("ckpt=auto", "hydra.run.dir=a", *LONG))
    job = here.submit(script, *NODES[nodes])
    here.wait(lambda: logged(here.folder / "a") >= 3, job)
    kill_task(here, job, 0)
    assert here.ended(job)["JobState"] == "FAILED", here.log(job)[-3000:]
    assert not saved(here.folder / "a")
    again = here.submit(script, *NODES[nodes])
    assert here.ended(again)["JobState"] == "COMPLETED", here.log(again)[-3000:]
    assert [row["step"] for row in rows(RunFolder(here.folder / "a"))] == list(range(1, STEPS + 1))


def test_a_notice_to_the_script_reaches_python_that_took_its_place(here, train):
    """--signal=B:USR1@120 is for the shell of the script, which would die of it."""
    job = here.submit(f"exec {train(*LONG, 'trainer.requeue=true', 'ckpt=auto', 'hydra.run.dir=a')}")
    here.wait(lambda: logged(here.folder / "a") >= 3, job)
    here.run("scancel", "--batch", "--signal=USR1", job)
    assert here.ended(job, restarts=1)["JobState"] == "COMPLETED", here.log(job)[-3000:]


@both
def test_a_finished_job_that_is_queued_again_is_done(here, train, nodes):
    job = here.submit(f"srun {train('ckpt=auto', 'hydra.run.dir=a')}", *NODES[nodes])
    assert here.ended(job)["JobState"] == "COMPLETED", here.log(job)[-3000:]
    here.run("scontrol", "requeue", job)
    assert here.ended(job, restarts=1)["JobState"] == "COMPLETED", here.log(job)[-3000:]


@both
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job(here, train, nodes, rank):
    job = here.submit(noted(here, train(*LONG, "hydra.run.dir=a")), *NODES[nodes])
    here.wait(lambda: logged(here.folder / "a") >= 3, job)
    began = time.monotonic()
    kill_task(here, job, rank)
    assert here.ended(job)["JobState"] == "FAILED", here.log(job)[-3000:]
    assert time.monotonic() - began < 10


@both
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_refused_ends_the_job(here, train, nodes, rank):
    """Before it has met the others, which wait for it. (Of the overrides those of the first process count.)"""
    script = f"[ $SLURM_PROCID = {rank} ] && wrong=--nonsense\nexec {train('hydra.run.dir=a')} $wrong\n"
    (here.folder / "task.sh").write_text(script)
    job = here.submit("srun bash task.sh", *NODES[nodes])
    assert here.ended(job, 60)["JobState"] == "FAILED", here.log(job)[-3000:]
    assert "error: unknown option --nonsense" in here.log(job)
    assert "Traceback" not in here.log(job)


def test_a_node_that_dies_is_no_loss(here, slurm, train):
    job = here.submit(
        f"srun {train(*LONG, 'trainer.ckpt_every=5', 'ckpt=auto', 'hydra.run.dir=a')}", "--requeue", *NODES[1]
    )
    here.wait(lambda: saved(here.folder / "a") >= 10, job)
    node = here.facts(job)["NodeList"]
    kill_node(slurm, node)
    try:
        assert here.ended(job, 300, restarts=1)["JobState"] == "COMPLETED", here.log(job)[-3000:]  # on the other one
    finally:
        start_node(slurm, node)
    assert [row["step"] for row in rows(RunFolder(here.folder / "a"))] == list(range(1, STEPS + 1))


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs hybridlm[sweep]")
def test_a_notice_to_a_job_of_submitit_saves_before_it_is_queued_again(here, train):
    launcher = [
        "hydra/launcher=slurm",
        "hydra.launcher.partition=low",
        "hydra.launcher.gpus_per_node=null",
        "hydra.launcher.mem_gb=null",
    ]
    launcher += ["hydra.launcher.cpus_per_task=1", "hydra.sweep.dir=sweep", "seed=1,2"]
    command = f"exec {train('-m', *launcher, *LONG)} > sweep.log 2>&1"
    sweep = subprocess.Popen(["bash", "-c", command], cwd=here.folder, env=here.environment)
    try:
        deadline = time.monotonic() + 120
        while min(logged(here.folder / "sweep" / job) for job in "01") < 3:
            assert time.monotonic() < deadline, (here.folder / "sweep.log").read_text()[-3000:]
            time.sleep(0.1)
        jobs = here.run("squeue", "-h", "-o", "%A", "--array").stdout.split()
        for job in jobs:
            here.run("scancel", f"--signal={signal.SIGUSR2.value}", job)
        here.wait(lambda: all(saved(here.folder / "sweep" / job) for job in "01"), jobs[0], 60)
        stopped = {job: saved(here.folder / "sweep" / job) for job in "01"}
        # Not for the sweep's own end: without accounting submitit looks at its jobs once in minutes.
        ends = [RunFolder(here.folder / "sweep" / job).summary for job in "01"]
        here.wait(lambda: [here.push(job) for job in jobs] and all(end.exists() for end in ends), jobs[0])
        for job, step in stopped.items():
            folder = RunFolder(here.folder / "sweep" / job)
            assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
            logs = "".join(path.read_text() for path in (here.folder / "sweep" / ".submitit").rglob("*.out"))
            assert f"resuming after step {step}" in logs
    finally:
        sweep.kill()

"""Remote loggers: files first, a failure never ends a run, W&B without a network, one W&B run for all starts of a run of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from hybridlm.compose import compose_config
from hybridlm.errors import UserError
from hybridlm.run_folder import RunFolder
from hybridlm.train import loggers as loggers_module
from hybridlm.train.loggers import Remote
from hybridlm.train.run import run
from hybridlm.train.tensorboard import TensorBoard
from hybridlm.train.wandb import wandb_arguments, written_rows

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
OWN = {"_step", "_runtime", "_timestamp"}  # W&B's


def rows(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


def scalars(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)}


def sent(folder: RunFolder) -> list[tuple[int, dict]]:
    """What all starts of the run wrote for W&B, histograms and tables left out."""
    found = []
    for step, row in written_rows(folder.path, folder.wandb_id.read_text().strip()):
        plain = {name: json.loads(value) for name, value in row.items() if name not in OWN}
        found.append((step, {name: value for name, value in plain.items() if isinstance(value, (int, float))}))
    return found


class Recorder:
    """A backend that remembers what it is told, and fails at a step if it is to."""

    def __init__(self, fails_at: int | None = None, folder: RunFolder | None = None) -> None:
        self.calls: list[tuple] = []
        self._fails_at, self._folder = fails_at, folder

    def start(self, rows):
        self.calls.append(("start", [row["step"] for row in rows]))
        return "begun"

    def log(self, row, step):
        if self._folder is not None:
            last = rows(self._folder)[-1]
            assert last["step"] == step
            assert scalars(last).items() >= row.items(), "the files have it before"
        self.calls.append(("log", step))
        if step == self._fails_at:
            raise ConnectionError("gone\nand more")

    def histogram(self, name, counts, edges, step):
        assert len(edges) == len(counts) + 1
        self.calls.append(("histogram", name, step))

    def samples(self, step, prompts, texts):
        self.calls.append(("samples", step, len(texts)))

    def summary(self, facts):
        self.calls.append(("summary", facts["steps"]))

    def close(self):
        self.calls.append(("close",))


def with_backend(monkeypatch, backend) -> None:
    monkeypatch.setattr(loggers_module, "Wandb", lambda *arguments, **settings: backend)


def test_a_remote_logger_gets_every_row_after_the_files_have_it(tiny, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    backend = Recorder(folder=folder)
    with_backend(monkeypatch, backend)
    extra = ["logger=wandb", "logger.gradients=true", "logger.expert_load=true", "model.pattern=MT:moe", "callbacks.samples.every=2"]
    run(compose_config([*tiny, *extra]), folder, None)
    logged = [call[1] for call in backend.calls if call[0] == "log"]
    assert logged == [1, 2, 4, 4, 6, 8, 8, 10, 12, 12]
    histograms = {(name, step) for kind, name, step in (call for call in backend.calls if call[0] == "histogram")}
    names = {"moe/1/load", "optim/gradients/blocks.0", "optim/gradients/blocks.1", "optim/gradients/embedding", "optim/gradients/norm"}
    assert histograms == {(name, step) for name in names for step in (1, 2, 4, 6, 8, 10, 12)}
    assert [call for call in backend.calls if call[0] == "samples"] == [("samples", 8, 3), ("samples", 12, 3)]
    assert backend.calls[0] == ("start", [])
    assert backend.calls[-2:] == [("summary", 12), ("close",)]


def test_histograms_are_sent_on_request_only(tiny, tmp_path, monkeypatch):
    backend = Recorder()
    with_backend(monkeypatch, backend)
    run(compose_config([*tiny, "logger=wandb", "model.pattern=T:moe", "trainer.max_steps=2"]), RunFolder(tmp_path / "run"), None)
    assert "histogram" not in {call[0] for call in backend.calls}


def test_a_remote_logger_that_fails_is_said_once_and_left_out(tiny, tmp_path, monkeypatch, capsys):
    backend = Recorder(fails_at=4)
    with_backend(monkeypatch, backend)
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "logger=wandb"]), folder, None)
    assert rows(folder)[-1]["step"] == 12
    assert folder.summary.exists()
    assert [call[1] for call in backend.calls if call[0] == "log"] == [1, 2, 4]
    lines = [line for line in capsys.readouterr().out.splitlines() if "ConnectionError" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning     the logger recorder failed")
    assert lines[0].endswith("ConnectionError: gone")


def test_a_run_that_fails_ends_its_remote_logger(tiny, tmp_path, monkeypatch):
    backend = Recorder()
    with_backend(monkeypatch, backend)
    monkeypatch.setattr("hybridlm.train.lightning_module.LitLM.validation_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(compose_config([*tiny, "logger=wandb"]), RunFolder(tmp_path / "run"), None)
    assert backend.calls[-1] == ("close",)


def test_nothing_begins_before_the_first_row():
    backend = Recorder()
    Remote(backend, [], expert_load=False, say=print).close()
    assert backend.calls == []


@pytest.mark.parametrize(("logger", "says"), [("wandb", "pip install wandb"), ("tensorboard", r"pip install 'hybridlm\[tensorboard\]'")])
def test_a_package_that_is_not_here_is_refused_in_one_line_and_leaves_no_folder(tiny, tmp_path, monkeypatch, logger, says):
    monkeypatch.setattr(loggers_module.importlib.util, "find_spec", lambda name: None)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=says) as refused:
        run(compose_config([*tiny, f"logger={logger}"]), folder, None)
    assert len(refused.value.problems) == 1
    assert not folder.path.exists()


def test_what_wandb_is_told_of_a_run_and_of_a_job_of_a_sweep(tiny, tmp_path):
    config = compose_config([*tiny, "logger=wandb", "logger.tags=[a,b]", "logger.entity=team"])
    alone = wandb_arguments(config, RunFolder(tmp_path / "7"), None)
    job = wandb_arguments(config, RunFolder(tmp_path / "7"), "sweep-a")
    assert (alone["group"], alone["job_type"], alone["name"], alone["mode"]) == (None, "train", f"{config.model.name} 7", "offline")
    assert (job["group"], job["job_type"], job["name"]) == ("sweep-a", "sweep", f"{config.model.name} sweep-a/7")
    assert (alone["tags"], alone["entity"], alone["config"]["optim"]["lr"]) == (["a", "b"], "team", config.optim.lr)


# ---- W&B itself, offline


def test_a_run_resumed_once_leaves_two_segments_of_one_run_with_every_metric_once(tiny, tmp_path):
    """The first start gets as far as step 10, the second goes on from 8: step 10 comes twice and is written once."""
    tiny = [*tiny, "logger=wandb", "model.pattern=MT:moe", "callbacks.samples.every=2", "optim.schedule=constant", "optim.warmup=1"]
    config = compose_config(tiny)
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "trainer.max_steps=10"]), folder, None)
    run_id = folder.wandb_id.read_text()
    assert [step for step, _ in sent(folder)] == [1, 2, 4, 6, 8, 10]
    run(config, folder, folder.step_checkpoint(8))
    assert folder.wandb_id.read_text() == run_id
    segments = [path for path in (folder.path / "wandb").glob("offline-run-*") if not path.is_symlink()]
    assert len(segments) == 2
    assert all(segment.name.endswith(run_id.strip()) for segment in segments)
    steps = [step for step, _ in sent(folder)]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
    for (step, row), line in zip(sent(folder), rows(folder), strict=True):
        assert step == line["step"]
        # Seconds differ where a step was run twice, and so do the checkpoints written before it.
        ours, theirs = ({name: value for name, value in each.items() if not name.startswith(("perf/", "samples"))} for each in (row, line))
        assert ours == pytest.approx(scalars(theirs), rel=1e-12)
        assert {name for name in scalars(line) if name.startswith("perf/")} - set(row) <= {"perf/ckpt_s"}


def test_rows_that_a_kill_kept_from_wandb_are_handed_over_when_the_run_goes_on(tiny, tmp_path):
    config = compose_config([*tiny, "logger=wandb"])
    folder = RunFolder(tmp_path / "run")
    run(config, folder, None)
    (segment,) = (folder.path / "wandb").glob("offline-run-*/*.wandb")
    content = segment.read_bytes()
    segment.write_bytes(content[: len(content) // 3])
    kept = [step for step, _ in sent(folder)]
    assert len(kept) < 4, "what is cut off is the end, within a record"
    run(config, folder, folder.step_checkpoint(8))
    assert [step for step, _ in sent(folder)] == [1, 2, 4, 6, 8, 10, 12]


def test_a_run_that_begins_to_log_to_wandb_when_it_goes_on_hands_over_its_past(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    run(compose_config(tiny), folder, None)
    run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=14"]), folder, folder.newest_checkpoint())
    assert [step for step, _ in sent(folder)] == [1, 2, 4, 6, 8, 10, 12, 14]


def test_long_records_and_a_second_block_are_read(tmp_path):
    """More than the 32 KiB of a block of the format, with a record that spans two."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    session = wandb.init(project="p", id="abcd", dir=str(tmp_path), mode="offline", settings=settings)
    for step in range(4):
        session.log({"text": f"{step}" * 20_000, "n": step}, step=step)
    session.finish()
    wandb.teardown()
    read = list(written_rows(tmp_path, "abcd"))
    assert [(step, json.loads(row["n"]), len(json.loads(row["text"]))) for step, row in read] == [(step, step, 20_000) for step in range(4)]


# ---- no network


def namespace() -> list[str]:
    """The words before a command that take its network away; skips where that is not allowed."""
    words = ["unshare", "-n"] if os.getuid() == 0 else ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode != 0:
        pytest.skip("no network namespaces here")
    return words


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces")
@pytest.mark.parametrize(
    ("settings", "key", "says"),
    [
        pytest.param(["logger.offline=true"], None, "wandb, offline", marks=pytest.mark.slow),
        pytest.param(["logger.offline=false", "logger.timeout=3"], "a" * 40, "goes on offline: CommError", marks=pytest.mark.slow),
        pytest.param(["logger.offline=false", "logger.timeout=3"], None, "goes on offline: UsageError", marks=pytest.mark.slow),
    ],
)
def test_without_a_network_a_run_goes_on_and_ends(tiny, tmp_path, environment, settings, key, says):
    environment = {name: value for name, value in environment.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_API_KEY": key} if key else {"HOME": str(tmp_path)}
    line = [*namespace(), sys.executable, str(TRAIN), *tiny, "logger=wandb", *settings, f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout
    assert "Traceback" not in done.stderr
    folder = RunFolder(tmp_path / "run")
    assert [step for step, _ in sent(folder)] == [row["step"] for row in rows(folder)] == [1, 2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_each_job_of_a_sweep_is_a_run_in_the_group_of_the_sweep(tiny, tmp_path, environment):
    from hybridlm.train.wandb import _records

    arguments = ["-m", *tiny, "seed=1,2", "logger=wandb", "trainer.max_steps=2", f"hydra.sweep.dir={tmp_path}/my-sweep"]
    done = subprocess.run([sys.executable, str(TRAIN), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = []
    for number in ("0", "1"):
        folder = RunFolder(tmp_path / "my-sweep" / number)
        (path,) = (folder.path / "wandb").glob("offline-run-*/*.wandb")
        record = next(record.run for record in _records(path.read_bytes()) if record.WhichOneof("record_type") == "run")
        told.append((record.run_group, record.job_type, record.display_name.rpartition(" ")[2], record.run_id))
        assert [step for step, _ in sent(folder)] == [1, 2]
    assert [part[:3] for part in told] == [("my-sweep", "sweep", "my-sweep/0"), ("my-sweep", "sweep", "my-sweep/1")]
    assert told[0][3] != told[1][3]


# ---- TensorBoard, whose package need not be here


def test_tensorboard_gets_scalars_histograms_and_texts(tmp_path, monkeypatch):
    calls: list[tuple] = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("begin", folder, purge_step))

        def __getattr__(self, name):
            return lambda *arguments, **named: calls.append((name, arguments, named))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert torch.utils is not None
    remote = Remote(TensorBoard(tmp_path), [{"step": 8}], expert_load=True, say=print)
    remote.log_metrics({"train/loss": 1.0, "moe/0/load": [3.0, 1.0]}, step=10)
    remote.samples(10, ["a"], ["abc"])
    remote.summary({"steps": 10})
    remote.close()
    assert calls[0] == ("begin", str(tmp_path), 9)
    assert ("add_scalar", ("train/loss", 1.0, 10), {}) in calls
    (histogram,) = (named for name, _, named in calls if name == "add_histogram_raw")
    assert (histogram["num"], histogram["sum"], histogram["bucket_limits"], histogram["global_step"]) == (4.0, 3.0, [1.0, 2.0], 10)
    assert calls[-1][0] == "close"

"""Remote loggers: files first, a failure never ends a run, W&B without a network, one W&B run for all starts of a run
of ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import from_yaml
from hybridlm.errors import ConfigError, UserError
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train import loggers as loggers_module
from hybridlm.train import wandb as wandb_module
from hybridlm.train.loggers import Remote
from hybridlm.train.run import run
from hybridlm.train.tensorboard import TensorBoard
from hybridlm.train.wandb import Wandb, _records, wandb_arguments, written_rows

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
OWN = {"_step", "_runtime", "_timestamp"}  # W&B's


def rows(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


def scalars(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)}


def sent(folder: RunFolder) -> list[tuple[int, dict]]:
    """What all starts of the run wrote for W&B, histograms and tables left out."""
    found = []
    for step, row in written_rows(folder.path, folder.wandb_id.read_text().split()[0]):
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
    extra = [
        "logger=wandb",
        "logger.gradients=true",
        "logger.expert_load=true",
        "model.pattern=MT:moe",
        "callbacks.samples.every=2",
    ]
    run(compose_config([*tiny, *extra]), folder, None)
    logged = [call[1] for call in backend.calls if call[0] == "log"]
    assert logged == [1, 2, 4, 4, 6, 8, 8, 10, 12, 12]
    histograms = {(name, step) for kind, name, step in (call for call in backend.calls if call[0] == "histogram")}
    names = {
        "moe/1/load",
        "optim/gradients/blocks.0",
        "optim/gradients/blocks.1",
        "optim/gradients/embedding",
        "optim/gradients/norm",
    }
    assert histograms == {(name, step) for name in names for step in (1, 2, 4, 6, 8, 10, 12)}
    assert [call for call in backend.calls if call[0] == "samples"] == [("samples", 8, 3), ("samples", 12, 3)]
    assert backend.calls[0] == ("start", [])
    assert backend.calls[-2:] == [("summary", 12), ("close",)]


def test_histograms_are_sent_on_request_only(tiny, tmp_path, monkeypatch):
    backend = Recorder()
    with_backend(monkeypatch, backend)
    run(
        compose_config([*tiny, "logger=wandb", "model.pattern=T:moe", "trainer.max_steps=2"]),
        RunFolder(tmp_path / "run"),
        None,
    )
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


@pytest.fixture(autouse=True)
def no_settings_of_wandb(monkeypatch):
    """Neither a developer's own nor those of the agent that runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def test_nothing_begins_before_the_first_row():
    backend = Recorder()
    Remote(backend, [], expert_load=False, say=print).close()
    assert backend.calls == []


@pytest.mark.parametrize(
    ("logger", "says"), [("wandb", "pip install wandb"), ("tensorboard", r"pip install 'hybridlm\[tensorboard\]'")]
)
def test_a_package_that_is_not_here_is_refused_in_one_line_and_leaves_no_folder(
    tiny, tmp_path, monkeypatch, logger, says
):
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
    assert (alone["group"], alone["job_type"], alone["name"], alone["mode"]) == (
        None,
        "train",
        f"{config.model.name} 7",
        "offline",
    )
    assert (job["group"], job["job_type"], job["name"]) == ("sweep-a", "sweep", f"{config.model.name} sweep-a/7")
    assert (alone["tags"], alone["entity"], alone["config"]["optim"]["lr"]) == (["a", "b"], "team", config.optim.lr)


# ---- W&B itself, offline


def test_a_run_resumed_once_leaves_two_segments_of_one_run_with_every_metric_once(tiny, tmp_path):
    """The first start gets as far as step 10, the second goes on from 8: step 10 comes twice and is written once."""
    tiny = [
        *tiny,
        "logger=wandb",
        "model.pattern=MT:moe",
        "callbacks.samples.every=2",
        "optim.schedule=constant",
        "optim.warmup=1",
    ]
    config = compose_config(tiny)
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "trainer.max_steps=10"]), folder, None)
    run_id = folder.wandb_id.read_text()
    assert [step for step, _ in sent(folder)] == [1, 2, 4, 6, 8, 10]
    run(config, folder, folder.step_checkpoint(8))
    assert folder.wandb_id.read_text() == run_id
    segments = [path for path in (folder.path / "wandb").glob("offline-run-*") if not path.is_symlink()]
    assert len(segments) == 2
    assert all(segment.name.endswith(run_id.split()[0]) for segment in segments)
    steps = [step for step, _ in sent(folder)]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
    for (step, row), line in zip(sent(folder), rows(folder), strict=True):
        assert step == line["step"]
        # Seconds differ where a step was run twice, and so do the checkpoints written before it.
        ours, theirs = (
            {name: value for name, value in each.items() if not name.startswith(("perf/", "samples"))}
            for each in (row, line)
        )
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


AGENT = (
    "WANDB_SWEEP_ID",
    "WANDB_RUN_ID",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_SWEEP_PARAM_PATH",
)  # what `wandb agent` sets


def address(folder: RunFolder) -> set[tuple[str, str, str]]:
    """Entity, project and id of the run, as every one of its starts wrote them for W&B."""
    files = [path for path in (folder.path / "wandb").glob("offline-run-*/*.wandb") if not path.parent.is_symlink()]
    records = (
        record for path in files for record in _records(path.read_bytes()) if record.WhichOneof("record_type") == "run"
    )
    return {(record.run.entity, record.run.project, record.run.run_id) for record in records}


def test_the_id_of_the_environment_is_the_runs_and_stays_when_it_goes_on(tiny, tmp_path, monkeypatch, capsys):
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=4"]), folder, None)
    assert "offline-run-*-chosen" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=6"]), folder, folder.newest_checkpoint())
    assert address(folder) == {("", "hybridlm", "chosen")}
    assert [step for step, _ in sent(folder)] == [1, 2, 4, 6]


def test_a_run_of_an_agent_is_the_agents_and_stays_so_when_it_goes_on_without(tiny, tmp_path, monkeypatch, capsys):
    folder, chosen = RunFolder(tmp_path / "run"), tmp_path / "chosen.yaml"
    chosen.write_text("wandb_version: 1\n\noptim.lr:\n  value: 0.01\n")
    with monkeypatch.context() as agent:
        for name, value in zip(AGENT, ("sweep", "trial", "elsewhere", "team", str(chosen)), strict=True):
            agent.setenv(name, value)
        run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=4"]), folder, None)
    assert "offline-run-*-trial" in capsys.readouterr().out
    run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=6"]), folder, folder.newest_checkpoint())
    assert address(folder) == {("team", "elsewhere", "trial")}
    assert [step for step, _ in sent(folder)] == [1, 2, 4, 6]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_service_of_wandb_that_is_killed_is_said_once(tiny, tmp_path, monkeypatch, capsys):
    log = Wandb.log

    def kill_before(backend, row, step):
        for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split() if step == 4 else ():
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                os.waitid(os.P_PID, int(child), os.WEXITED | os.WNOWAIT)
        log(backend, row, step)

    monkeypatch.setattr(Wandb, "log", kill_before)
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "logger=wandb"]), folder, None)
    assert folder.summary.exists()
    assert [row["step"] for row in rows(folder)] == [1, 2, 4, 6, 8, 10, 12]
    assert capsys.readouterr().out.count("warning     ") == 1


def test_rows_that_wandb_dropped_are_told_at_the_end(tiny, tmp_path, monkeypatch, capsys):
    """Its service tells nobody of a disk that is full."""
    monkeypatch.setattr(wandb_module, "written_rows", lambda folder, run_id: iter([(1, {}), (2, {})]))
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=4"]), folder, None)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert (
        line
        == f"warning     wandb lacks what came behind step 2, as it could not write {folder.path}/wandb; metrics.jsonl"
        " has it"
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("logger.project=a/b", "logger.project = 'a/b': legal are characters other than / \\ # ? % :, this has /"),
        (f"logger.project={'p' * 129}", "expected 1 to 128 characters, this has 129"),
        ("logger.entity=team/x", "logger.entity = 'team/x': "),
        ("logger.entity=''", "logger.entity = '': expected 1 to 128 characters, this has 0"),
        (f"logger.run_name={'n' * 129}", "logger.run_name = "),
        (f"logger.group={'g' * 129}", "logger.group = "),
        (f"logger.job_type={'j' * 65}", "legal are 1 to 64 characters, this has 65"),
        (f"logger.tags=[a,{'t' * 65}]", "legal are tags of 1 to 64 characters"),
        ("logger.tags=['']", "legal are tags of 1 to 64 characters, '' has 0"),
    ],
)
def test_names_that_wandb_refuses_are_refused_at_the_start(tiny, override, says):
    compose_config([*tiny, override])  # nobody is asked for them
    with pytest.raises(ConfigError) as refused:
        compose_config([*tiny, "logger=wandb", override])
    (problem,) = refused.value.problems
    assert says in problem


def test_the_rules_are_those_of_the_installed_package(tiny, tmp_path):
    import wandb

    for wrong in "/\\#?%:":
        with pytest.raises(wandb.errors.UsageError):
            wandb.Settings(project=f"a{wrong}b")
    config = compose_config([*tiny, "logger=wandb", f"model.name={'m' * 200}"])
    told = wandb_arguments(config, RunFolder(tmp_path / ("r" * 200)), "s" * 200)
    assert {len(told[name]) for name in ("name", "group")} == {128}


def test_a_run_id_that_wandb_refuses_is_refused_at_the_start(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "a/b")
    with pytest.raises(UserError, match=r"WANDB_RUN_ID=a/b: .*cannot contain the characters"):
        run(compose_config([*tiny, "logger=wandb"]), RunFolder(tmp_path / "run"), None)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_documented_sweep_of_an_agent_runs(tiny, tmp_path, environment):
    """With the command and the arguments that W&B makes of the YAML in docs/sweeps.md, and the variables that its agent
    sets."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    text = (TRAIN.parent / "docs/sweeps.md").read_text(encoding="utf-8")
    sweep = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    chosen = {name: {"value": choice["values"][0]} for name, choice in sweep["parameters"].items()}
    words = create_sweep_command_args({"args": chosen})
    command = [word for part in create_sweep_command(sweep["command"]) for word in words.get(part.strip("${}"), [part])]
    program = [sys.executable, str(TRAIN)]
    line = [
        word
        for part in command
        for word in {"${env}": [], "/usr/bin/env": [], "${interpreter}": [], "${program}": program}.get(part, [part])
    ]
    assert line[:2] == program
    for name, value in zip(AGENT, ("sweep", "trial", "elsewhere", "team", str(tmp_path / "chosen.yaml")), strict=True):
        environment[name] = value
    (tmp_path / "chosen.yaml").write_text(yaml.safe_dump({"wandb_version": 1, **chosen}))
    settings = [*tiny, "trainer.max_steps=4", "logger.offline=true", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(
        [*line, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = RunFolder(tmp_path / "run")
    assert address(folder) == {("team", "elsewhere", "trial")}
    assert sweep["metric"]["name"] in rows(folder)[-1]
    config = from_yaml(folder.config.read_text())
    assert (config.optim.lr, config.model.pattern) == (
        sweep["parameters"]["optim.lr"]["values"][0],
        sweep["parameters"]["model.pattern"]["values"][0],
    )


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
    assert [(step, json.loads(row["n"]), len(json.loads(row["text"]))) for step, row in read] == [
        (step, step, 20_000) for step in range(4)
    ]


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
        pytest.param(
            ["logger.offline=false", "logger.timeout=3"], "a" * 40, "goes on offline: CommError", marks=pytest.mark.slow
        ),
        pytest.param(
            ["logger.offline=false", "logger.timeout=3"], None, "goes on offline: UsageError", marks=pytest.mark.slow
        ),
    ],
)
def test_without_a_network_a_run_goes_on_and_ends(tiny, tmp_path, environment, settings, key, says):
    environment = {name: value for name, value in environment.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "WANDB_API_KEY": key} if key else {"HOME": str(tmp_path)}
    line = [*namespace(), sys.executable, str(TRAIN), *tiny, "logger=wandb", *settings, f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout
    assert "Traceback" not in done.stderr
    folder = RunFolder(tmp_path / "run")
    assert [step for step, _ in sent(folder)] == [row["step"] for row in rows(folder)] == [1, 2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_each_job_of_a_sweep_is_a_run_in_the_group_of_the_sweep(tiny, tmp_path, environment):
    arguments = ["-m", *tiny, "seed=1,2", "logger=wandb", "trainer.max_steps=2", f"hydra.sweep.dir={tmp_path}/my-sweep"]
    done = subprocess.run(
        [sys.executable, str(TRAIN), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
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
    assert (histogram["num"], histogram["sum"], histogram["bucket_limits"], histogram["global_step"]) == (
        4.0,
        3.0,
        [1.0, 2.0],
        10,
    )
    assert calls[-1][0] == "close"

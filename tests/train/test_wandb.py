"""Weights & Biases: one W&B run for all starts of a run, offline, without a network; what is refused at the start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import from_yaml
from hybridlm.errors import ConfigError
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.loggers import Wandb
from hybridlm.train.run import run

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
OWN = {"_step", "_runtime", "_timestamp"}  # W&B's


def rows(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


def scalars(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)}


def records(folder: RunFolder) -> list:
    """What every start of the run wrote for W&B, in LevelDB's log format: blocks of 32 KiB, records in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    paths = [path for path in folder.path.glob("wandb/*run-*/*.wandb") if not path.parent.is_symlink()]
    for content in (path.read_bytes() for path in sorted(paths, key=lambda path: path.parent.name)):
        place, record = 7, b""  # behind the file's header
        while place + 7 <= len(content):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            _, length, kind = struct.unpack_from("<IHB", content, place)
            record += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                found.append(Record())
                found[-1].ParseFromString(record)
                record = b""
    return found


def sent(folder: RunFolder) -> list[tuple[int, dict]]:
    """The rows among them, tables left out."""
    found = []
    for history in (record.history for record in records(folder) if record.WhichOneof("record_type") == "history"):
        plain = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        numbers = {name: value for name, value in plain.items() if isinstance(value, (int, float)) and name not in OWN}
        found.append((history.step.num, numbers))
    return found


@pytest.fixture(autouse=True)
def no_settings_of_wandb(monkeypatch):
    """Neither a developer's own nor those of the agent that runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def test_the_arguments_of_wandb_for_a_run_and_for_a_job_of_a_sweep(tiny, tmp_path):
    config = compose_config([*tiny, "logger=wandb", "logger.tags=[a,b]", "logger.entity=team"])
    alone = Wandb(config, RunFolder(tmp_path / "7"), None).arguments
    job = Wandb(config, RunFolder(tmp_path / "7"), "sweep-a").arguments
    assert (alone["group"], alone["job_type"], alone["name"], alone["mode"]) == (
        None,
        "train",
        f"{config.model.name} 7",
        "offline",
    )
    assert (job["group"], job["job_type"], job["name"]) == ("sweep-a", "sweep", f"{config.model.name} sweep-a/7")
    assert (alone["tags"], alone["entity"], alone["config"]["optim"]["lr"]) == (["a", "b"], "team", config.optim.lr)


def test_a_resumed_run_leaves_two_segments_of_one_run(tiny, tmp_path):
    """The first start gets as far as step 10, the second resumes from 8: offline, step 10 is in both."""
    settings = ["logger=wandb", "model.pattern=MT:moe", "callbacks.samples.every=2", "optim.schedule=constant"]
    tiny = [*tiny, *settings, "optim.warmup=1"]
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "trainer.max_steps=10"]), folder, None)
    run_id = folder.wandb_id.read_text()
    first = sent(folder)
    assert [step for step, _ in first] == [1, 2, 4, 6, 8, 10]
    run(compose_config(tiny), folder, folder.step_checkpoint(8))
    assert folder.wandb_id.read_text() == run_id
    segments = [path for path in (folder.path / "wandb").glob("offline-run-*") if not path.is_symlink()]
    assert len(segments) == 2
    assert all(segment.name.endswith(run_id.split()[0]) for segment in segments)
    again = sent(folder)[len(first) :]
    assert [step for step, _ in again] == [10, 12]
    for (step, row), line in zip([*first[:-1], *again], rows(folder), strict=True):
        assert step == line["step"]
        ours = {name: value for name, value in row.items() if not name.startswith("samples")}
        assert ours == pytest.approx(scalars(line), rel=1e-12)


def test_online_a_resumed_run_is_continued_by_wandb(tiny, tmp_path, monkeypatch):
    """It is asked to resume the recorded id; which rows it then drops is its own matter."""
    asked = []

    class Run:
        id, project, entity, url, summary = "abcd", "p", "us", "http://here", {}

        def __init__(self) -> None:
            self.steps = []

        def define_metric(self, *_, **__):
            pass

        def log(self, row, step):
            self.steps.append(step)

        def finish(self):
            pass

    def init(**arguments):
        asked.append((arguments["mode"], arguments.get("resume"), arguments["id"], arguments["project"], Run()))
        return asked[-1][-1]

    monkeypatch.setattr("wandb.init", init)
    folder = RunFolder(tmp_path / "run")
    online = [*tiny, "callbacks=none", "logger=wandb", "logger.offline=false"]
    run(compose_config([*online, "trainer.max_steps=8"]), folder, None)
    assert folder.wandb_id.read_text() == "abcd\np\nus\n"
    run(compose_config([*online, "logger.project=other"]), folder, folder.step_checkpoint(8))
    (_, _, _, _, first), (mode, resume, run_id, project, second) = asked
    assert (mode, resume, run_id, project) == ("online", "allow", "abcd", "p")
    assert first.steps == [1, 2, 4, 4, 6, 8, 8]
    assert second.steps == [10, 12, 12]


AGENT = (
    "WANDB_SWEEP_ID",
    "WANDB_RUN_ID",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_SWEEP_PARAM_PATH",
)  # what `wandb agent` sets


def address(folder: RunFolder) -> set[tuple[str, str, str]]:
    """Entity, project and id of the run, as every one of its starts wrote them for W&B."""
    runs = (record.run for record in records(folder) if record.WhichOneof("record_type") == "run")
    return {(run.entity, run.project, run.run_id) for run in runs}


def test_the_id_of_the_environment_is_kept_over_a_resume(tiny, tmp_path, monkeypatch, capsys):
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=4"]), folder, None)
    assert "offline-run-*-chosen" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=6"]), folder, folder.newest_checkpoint())
    assert address(folder) == {("", "hybridlm", "chosen")}
    assert [step for step, _ in sent(folder)] == [1, 2, 4, 6]


def test_a_run_of_an_agent_stays_the_agents_when_it_is_resumed_without_one(tiny, tmp_path, monkeypatch, capsys):
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
def test_a_killed_wandb_service_is_reported_once(tiny, tmp_path, monkeypatch, capsys):
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


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("logger.project=a/b", "logger.project = 'a/b': "),
        (f"logger.project={'p' * 129}", "<= 128"),
        ("logger.entity=team/x", "logger.entity = 'team/x': "),
        ("logger.entity=''", "logger.entity = ''"),
        (f"logger.run_name={'n' * 129}", "logger.run_name = "),
        (f"logger.group={'g' * 129}", "logger.group = "),
        (f"logger.job_type={'j' * 65}", "<= 64"),
        (f"logger.tags=[a,{'t' * 65}]", "logger.tags"),
        ("logger.tags=['']", "logger.tags = ['']"),
    ],
)
def test_names_that_wandb_refuses_are_refused_at_the_start(tiny, override, says):
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
    told = Wandb(config, RunFolder(tmp_path / ("r" * 200)), "s" * 200).arguments
    assert {len(told[name]) for name in ("name", "group")} == {128}


def test_a_run_id_that_wandb_refuses_is_reported_and_the_run_continues(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "a/b")
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "logger=wandb", "trainer.max_steps=2"]), folder, None)
    assert folder.summary.exists()
    assert "cannot contain the characters" in capsys.readouterr().out


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
        pytest.param(["logger.offline=true"], None, "wandb sync", marks=pytest.mark.slow),
        pytest.param(["logger.offline=false", "logger.timeout=3"], "a" * 40, "CommError", marks=pytest.mark.slow),
        pytest.param(["logger.offline=false", "logger.timeout=3"], None, "UsageError", marks=pytest.mark.slow),
    ],
)
def test_without_a_network_a_run_finishes(tiny, tmp_path, environment, settings, key, says):
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
        record = next(record.run for record in records(folder) if record.WhichOneof("record_type") == "run")
        told.append((record.run_group, record.job_type, record.display_name.rpartition(" ")[2], record.run_id))
        assert [step for step, _ in sent(folder)] == [1, 2]
    assert [part[:3] for part in told] == [("my-sweep", "sweep", "my-sweep/0"), ("my-sweep", "sweep", "my-sweep/1")]
    assert told[0][3] != told[1][3]

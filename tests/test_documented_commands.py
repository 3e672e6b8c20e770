"""Every command of README.md and the docs does what it says there.

Fast: each is composed or parsed, with all its options and every value of a grid; what plans or only prints is run;
printed mistakes are compared. Slow: those on a run are executed in their order on a small one, each training command
trains two steps of a tiny model.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import groupby

import pytest
import typer
import yaml
from documented_commands import ROOT, Command, blocks, commands
from typer.testing import CliRunner

from hybridlm.cli.arguments import models
from hybridlm.cli.compose import compose_config, sweep_axes
from hybridlm.cli.compose import composed as compose_line
from hybridlm.cli.verbs import app, run_app
from hybridlm.config.groups import OF_PLUGINS
from hybridlm.config.load import load_config
from hybridlm.config.overrides import HYDRA_FLAGS, key_of, refuse_flags, split

COMMANDS = commands()
TAGS = {"sh", "console", "python", "yaml", "text"}
ON_A_RUN = ("generate", "chat", "serve", "eval", "bench", "report", "export", "import", "push")
ON_A_CONFIGURATION = ("plan", "check", "prepare", "sweep")
# What no test runs: each with the reason, and what is looked at instead.
ELSEWHERE = {
    "pip": "changes the installation; the extras that it names exist",
    "make": "makes an installation of its own; the target exists",
    "curl": "needs a server; tests/serve asks one",
    "script": "minutes to hours; the script exists",
}
_NOT_COMPOSED = re.compile(r"ckpt|init_from|hydra\..*|hydra/(launcher|sweeper)")  # needs a run, or belongs to Hydra


def kind(command: Command) -> str | None:
    """Of the classes below; None: it is in none."""
    first, *rest = command.words
    if first in ("pip", "make", "curl"):
        return first
    if first == "python":
        return "train" if rest[0] == "train.py" else "script" if (ROOT / rest[0]).is_file() else None
    if first == "hybridlm":
        return rest[0] if rest[0] in ("train", "doctor", *ON_A_RUN, *ON_A_CONFIGURATION) else None
    return None


def of(*kinds: str) -> list:
    return [
        pytest.param(command, id=f"{command.where} {command.line[:60]}")
        for command in COMMANDS
        if kind(command) in kinds
    ]


def verb_context(words):
    """The arguments of a verb as its parser reads them. Raises what a wrong option raises."""
    group = typer.main.get_command(app)
    verb = group.get_command(None, words[1])
    return verb.make_context(words[1], list(words[2:]), resilient_parsing=False)


def composed(overrides):
    """Points of a grid among which every value is, or the one configuration; without what belongs to a run and to
    plugins."""
    kept = [line for line in overrides if not _NOT_COMPOSED.fullmatch(key_of(line))]
    wanted = [line.lstrip("+") for line in overrides if key_of(line) in ("hydra/launcher", "hydra/sweeper")]
    assert all(line.replace("=", "/") in OF_PLUGINS or line == "hydra/launcher=slurm" for line in wanted)
    axes = [axis.values for axis in sweep_axes(kept)]
    points = range(max([1, *map(len, axes)]))
    return [config_of(tuple(values[point % len(values)] for values in axes if values)) for point in points]


@cache
def config_of(overrides):
    """The pages show some commands more than once."""
    return compose_config(overrides)


def test_every_block_and_command_is_in_a_class():
    assert {block.tag for block in blocks()} <= TAGS, [block.where for block in blocks() if block.tag not in TAGS]
    assert [(command.where, command.line) for command in COMMANDS if kind(command) is None] == []
    assert len(COMMANDS) > 60


def test_a_yaml_block_is_an_experiment_that_composes(tmp_path):
    """Or a sweep of W&B, whose parameters are fields of ours."""
    (tmp_path / "experiments").mkdir()
    for number, block in enumerate(block for block in blocks() if block.tag == "yaml"):
        tree = yaml.safe_load(block.text)
        if "parameters" in tree:
            compose_config(
                [f"{name}={values['values'][0]}" for name, values in tree["parameters"].items() if "values" in values]
            )
            continue
        (tmp_path / f"experiments/block{number}.yaml").write_text(
            f"# @package _global_\n{block.text}\n", encoding="utf-8"
        )
        load_config(compose_line(split(["--config-dir", str(tmp_path), f"experiments=block{number}"])).tree)


@pytest.mark.parametrize("command", [param for param in of("train") if not param.values[0].output])
def test_a_training_command_composes(command):
    words = command.words[2:]
    refuse_flags(words, HYDRA_FLAGS, "")
    line = split(words)
    if not line.multirun:
        assert all(
            len(axis.values) == 1
            for axis in sweep_axes([x for x in line.overrides if not _NOT_COMPOSED.fullmatch(key_of(x))])
        )
    assert composed(line.overrides)


@pytest.mark.parametrize("command", [param for param in of(*ON_A_CONFIGURATION) if not param.values[0].output])
def test_a_command_on_a_configuration_composes(command):
    given = verb_context(command.words).params
    overrides = given["overrides"] or []
    refuse_flags(overrides, (), "")
    assert given.get("resume") or composed(overrides)


@pytest.mark.parametrize("command", [param for param in of("plan") if not param.values[0].output][:1])
def test_a_plan_is_made(command):
    result = CliRunner().invoke(app, list(command.words[1:]))
    assert (result.exit_code, "tokens/s" in result.stdout) == (0, True), result.output


@pytest.mark.parametrize("command", of(*ON_A_RUN))
def test_a_command_on_a_run_is_parsed(command):
    given = verb_context(command.words).params
    if command.words[1] == "bench" and "=" in (given["what"] or ["last"])[0]:
        assert models(given["what"], given["compare"])[1]


@pytest.mark.parametrize("command", [param for param in of("train", *ON_A_CONFIGURATION) if param.values[0].output])
def test_a_mistake_costs_the_line_that_is_printed(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_app(["train", *command.words[2:]] if command.words[0] == "python" else command.words[1:])
    said = capfd.readouterr()
    assert (end.value.code, said.out, said.err.strip()) == (2, "", command.output)


@pytest.mark.parametrize("command", of(*ELSEWHERE))
def test_what_is_not_run_here_exists(command):
    text = (ROOT / "Makefile").read_text(encoding="utf-8") + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if command.words[0] == "make":
        assert f"\n{command.words[1]}: " in text
    for extra in re.findall(r"hybridlm\[(\w+)\]", command.line):
        assert f"\n{extra} = [" in text


def small(overrides):
    """A documented command with a model and a task that train in seconds: what chooses sizes, cards, data and steps is
    left away."""
    own = (
        "size=",
        "hardware=",
        "trainer.max_steps=",
        "data=",
        "data.path=",
        "data.parts=",
        "hydra/",
        "hydra.",
        "kernels=cuda",
        "model=slm",
    )
    kept = [line for line in overrides if not line.startswith(own)]
    data = ["data=files", "data.path=notes/**/*.txt", "data.out=prepared", "data.val_fraction=0.2"]
    if "data=synthetic" in overrides:
        data = ["data=synthetic", "data.synthetic.val_examples=8"]
    steps = ["trainer.max_steps=4" if "ckpt=last" in overrides else "trainer.max_steps=2"]
    return [*kept, *data, *steps, "size=tiny", "hardware=cpu", "callbacks.samples.tokens=4"]


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory):
    """A folder with the files that the pages speak of, and a run."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("notes/a", "other"):
        (folder / name).mkdir(parents=True)
        for path in corpus.glob("*.txt"):
            (folder / name / path.name).write_bytes(path.read_bytes())
    (folder / "start.txt").write_text("once ", encoding="utf-8")
    trained(folder, [])
    return folder


def trained(folder, overrides):
    line = [sys.executable, str(ROOT / "train.py"), *small(overrides)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])


def plain_training():
    """Training commands of one run, each set of overrides once."""
    lines = {
        tuple(small(command.words[2:])): command
        for command in COMMANDS
        if kind(command) == "train" and not command.output
    }
    single = [c for c in lines.values() if not {"-m", "--cfg"} & set(c.words) and "trainer.requeue=true" not in c.words]
    single = [
        c for c in single if "init_from=" not in c.line
    ]  # needs a run of the same model: tests/train/test_initial.py
    return [pytest.param(command, id=command.line[:60]) for command in single]


@pytest.mark.slow
@pytest.mark.parametrize("command", plain_training())
def test_a_training_command_trains(command, place):
    trained(place, [word for word in command.words[2:] if word != "kernels=cuda"])


@pytest.mark.slow
def test_the_commands_on_a_run_in_their_order(place):
    """By a shell, so that pipes and quotes are those of the page. What takes long is cut by an option behind it."""
    shorter = {"generate": "-n 8", "eval": "--limit 2", "bench": "--contexts 32 --rounds 1 --new-tokens 2 --budget 20"}
    trained(place, [])  # `last`, whatever was trained before
    pretend = f'hybridlm() {{ {shlex.quote(sys.executable)} -m hybridlm "$@"; }}\n'
    for command in COMMANDS:
        verb = command.words[1] if kind(command) in ON_A_RUN else None
        # Folders of other runs; a command that does not end; data sets of the hub; an upload to it.
        if verb in (None, "report", "serve") or {"--tasks", "--yes"} & set(command.words):
            continue
        if verb in ("export", "import"):  # several pages write the same folder
            shutil.rmtree(place / command.words[3], ignore_errors=True)
            (place / command.words[3]).unlink(missing_ok=True)
        line = command.line.split("  #")[0].replace("RUN", "last")
        if verb == "eval":
            line = f"{line} data.val_fraction=0.2" if "data=files" in line else line
        script = f"{pretend}{line} {shorter.get(verb, '')}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=place, input="hello\n", capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (script, done.stdout[-2000:], done.stderr[-2000:])


SCRIPTS = {
    page: [block for block in found if block.tag == "python"]
    for page, found in groupby(blocks(), lambda block: block.where.partition(":")[0])
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, found in SCRIPTS.items() if found])
def test_the_python_of_a_page_runs(page, place):
    """Its blocks, one after the other in one process, where the folders are that the page exports before."""
    trained(place, [])
    for command in COMMANDS:
        if command.where.startswith(page) and command.words[1:3] == ("export", "last"):
            shutil.rmtree(place / command.words[3], ignore_errors=True)
            line = [sys.executable, "-m", "hybridlm", *command.words[1:]]
            subprocess.run(line, cwd=place, check=True, capture_output=True, timeout=300)
    script = "\n".join(block.text for block in SCRIPTS[page])
    done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, timeout=300)
    assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr

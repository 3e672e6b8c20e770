"""Settings of other programs are answered with ours, on a command line and in the docs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybridlm.cli.compose import compose_config
from hybridlm.cli.verbs import app
from hybridlm.config.foreign_names import NAMES, OTHERS, foreign
from hybridlm.config.groups import groups
from hybridlm.config.overrides import HYDRA_FLAGS, refuse_flags
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError

PAGE = Path(__file__).parents[2] / "docs/from_other_tools.py"
EVERY = [(tool, name, found) for tool, names in NAMES.items() for name, found in names.items()]


def test_what_a_name_is_here_exists():
    for _, name, found in EVERY:
        first, _, rest = found.ours.partition(" ")
        field, equals, value = first.partition("=")
        if not found.ours:
            assert found.remark, name
        elif first == "hybridlm":
            assert rest.split()[0] in {
                command.name or command.callback.__name__.replace("evaluate", "eval")
                for command in app.registered_commands
            }
        elif field in groups() and equals:
            assert field == "experiments" or value in groups()[field], name
        elif field != "hydra.run.dir":
            section: object = RunConfig()
            for part in field.split("."):
                assert hasattr(section, part), (name, found.ours)
                section = getattr(section, part)


@pytest.mark.parametrize(("tool", "name", "found"), EVERY, ids=lambda value: value if isinstance(value, str) else "")
def test_each_name_is_one_line_with_ours(tool, name, found):
    """As a flag, in either spelling, unless Hydra has such a flag."""
    if f"--{name}" in HYDRA_FLAGS:
        return
    for flag in (f"--{name}=3", f"--{name.replace('_', '-')}", f"--{name} 3"):
        with pytest.raises(UserError) as error:
            refuse_flags(flag.split(), HYDRA_FLAGS, "")
        (problem,) = error.value.problems
        assert problem.startswith(f"{flag}: a field is set without dashes; "), problem
        whose = f"; {name} is " if tool == OTHERS else f"'s {name} is "
        assert not found.ours or whose in problem, problem
        assert (f"is {found.ours} here" if found.ours else found.remark) in problem


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("batch_size=12", "batch_size = 12: unknown key; nanoGPT's batch_size is data.batch_size here"),
        (
            "learning_rate=3",
            "learning_rate = 3: unknown key; nanoGPT's learning_rate is optim.lr here (optim.muon.lr for the matrices",
        ),
        ("train.max_norm=1", "train: unknown key; litgpt's train.max_norm is optim.clip here"),
        ("dtype=float16", "dtype = 'float16': unknown key; nanoGPT's dtype is trainer.precision here"),
        ("dropout=0.1", "dropout = 0.1: unknown key; there is no dropout; leave it out"),
        ("model.n_layer=4", "model.n_layer = 4: unknown key; did you mean model.n_layers?"),
        (
            "optim.learning_rate=1e-3",
            "optim.learning_rate = 0.001: unknown key; nanoGPT's learning_rate is optim.lr here",
        ),
        ("trainer.batch_size=4", "trainer.batch_size = 4: unknown key; did you mean data.batch_size?"),
    ],
)
def test_as_a_field(line, said):
    with pytest.raises(UserError) as error:
        compose_config([line])
    (problem,) = error.value.problems
    assert problem.startswith(said)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--optim.lr=1e-3"], ["--optim.lr=1e-3: a field is set without dashes: optim.lr=1e-3"]),
        (["--data.seq-len", "64"], ["--data.seq-len 64: a field is set without dashes: data.seq_len=64"]),
        (["--val_every=3"], ["--val_every=3: a field is set without dashes; did you mean trainer.val_every?"]),
        (["--frob", "seed=1"], ["unknown option --frob; legal: --json"]),
        (["--depth=20", "-x"], ["--depth=20: a field is", "unknown option -x; legal: "]),
        (["optim.lr=-1"], []),
    ],
)
def test_flags_of_a_verb(words, lines):
    result = CliRunner().invoke(app, ["plan", "size=nothing", *words])
    said = result.stderr.splitlines()
    assert result.exit_code == 2
    if lines:
        assert len(said) == len(lines)
        assert all(line.startswith(f"error: {expected}") for line, expected in zip(said, lines, strict=True)), said
    else:
        assert said[0].startswith("config error: size=nothing")


def test_hydras_own_flags_pass():
    refuse_flags([*HYDRA_FLAGS, "--cfg", "job", "--config-dir=x", "optim.lr=-3", "-m", "~data"], HYDRA_FLAGS, "")


def test_the_page_is_the_table():
    spec = importlib.util.spec_from_file_location("from_other_tools", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.MARKS.sub(lambda match: match[1] + module.tables() + match[2], text) == text
    assert foreign("nothing_like_it") is None

"""``hybridlm check`` as a user meets it: exit codes, one line for a mistake, a table or JSON lines, nothing written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hybridlm.cli.compose import compose_config
from hybridlm.cli.verbs import app
from hybridlm.eval import gate
from hybridlm.eval.gate_subject import Subject, distinct_layers, make_plan
from hybridlm.layers.mamba2 import Mamba2

SMALL = [
    "model.d_model=16",
    "model.n_layers=null",
    "model.attention.n_heads=2",
    "model.mamba2.head_dim=8",
    "model.mamba2.chunk=4",
]
SMALL += ["model.mamba2.d_state=4", "model.mlp.d_ff=24"]
ROWS = [
    "causality",
    "decode",
    "chunked prefill",
    "left padding",
    "documents",
    "checkpointing",
    "gradients",
    "derivative",
]
ROWS += ["initial weights", "parameters", "state bytes", "FLOPs", "experts"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDLM_CACHE", str(tmp_path / "cache"))
    yield
    assert list(tmp_path.iterdir()) == [], "check writes nothing"


def check(*arguments):
    return CliRunner().invoke(app, ["check", *arguments])


def test_a_table_in_plain_text():
    """Also for the card of another machine."""
    result = check(*SMALL, "model.pattern=TMT", "hardware=rtx3070")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    head, columns, *lines, last = result.stdout.splitlines()
    assert "2 distinct of 3 layers, 16 wide, float64" in head
    assert columns.split() == ["check", "compared", "worst", "error", "limit", "seconds"]
    assert [line.split("  ")[0] for line in lines] == ROWS
    assert [line.split()[-2] for line in lines[:-1]] == ["PASS"] * 12
    assert lines[-1].split() == ["experts", "no", "layer", "has", "experts", "n/a"]
    assert last.startswith("12 checks passed in")


def test_json_lines():
    result = check(*SMALL, "model.pattern=T:moe", "model.moe.d_expert=8", "--json")
    assert result.exit_code == 0, result.output
    head, *rows = map(json.loads, result.stdout.splitlines())
    assert "1 distinct of 1 layers" in head["checked"]
    assert [row["name"] for row in rows] == ROWS
    assert all(row.keys() == {"name", "compared", "error", "limit", "status", "seconds", "note"} for row in rows)
    assert {row["status"] for row in rows} == {"pass"}
    assert all(row["error"] <= row["limit"] for row in rows)


class GivesNaN(Mamba2):
    def forward(self, x, seq, cache=None):
        return super().forward(x, seq, cache) * float("nan")


@pytest.mark.parametrize("style", ["plain", "json"])
def test_a_failure_is_code_1_and_names_the_layer(monkeypatch, style):
    """What is no number never passes."""
    monkeypatch.setattr("hybridlm.layers.mamba2.Mamba2", GivesNaN)
    result = check(*SMALL, "model.pattern=T:none M2", *(["--json"] if style == "json" else []))
    assert result.exit_code == 1, result.output
    numeric = ROWS[:8]
    if style == "json":
        rows = {row["name"]: row for row in map(json.loads, result.stdout.splitlines()[1:])}
        assert [name for name, row in rows.items() if row["status"] == "fail"] == numeric
        assert all(rows[name]["error"] is None and "mamba2 (layer 1)" in rows[name]["note"] for name in numeric)
    else:
        said = result.stdout.splitlines()
        assert [line.split("  ")[0] for line in said if " FAIL " in line] == numeric
        for name in numeric:
            assert (
                len([line for line in said if line.startswith(f"{name}: ") and "to blame: mamba2 (layer 1)" in line])
                == 1
            )
        assert said[-1].startswith("8 of 12 checks failed in")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["model.patern=TM"], ["did you mean model.pattern?"]),
        (["model.pattern=TMX"], ["position 3", "'X'"]),
        (["model=hybird_small"], ["did you mean model=hybrid_small?"]),
        (["--fast"], ["unknown option --fast", "--json"]),
        (["-m", "optim.lr=1,2"], ["unknown option -m"]),
        (["fast"], ["'fast'", "field=value"]),
        (["ckpt=last"], ["ckpt = 'last'", "remove ckpt"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_code_2_and_one_line(arguments, parts):
    result = check(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith(("config error: ", "error: "))
    assert [part for part in parts if part not in result.stderr] == []


def test_a_section_without_effect_is_a_warning(monkeypatch):
    monkeypatch.setattr(gate, "_CHECKS", ())
    result = check(*SMALL, "model.pattern=T")
    assert result.exit_code == 0
    assert "no layer is mamba2" in result.stderr


def test_help_and_the_command_itself(environment):
    """Once as a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "hybridlm", "check", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert result.returncode == 0
    for word in ("causality", "documents", "FLOPs", "--json", "Exit code"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        (["model=hybrid_alternating", "size=d26"], 200),
        (["model.pattern=(TM)*500"], 200),
        (["model.pattern=ST", "model.variants={S: {mixer: attention, window: 100000}}"], 200),
        (["model.pattern=M", "model.mamba2.chunk=1024"], 200),
        (
            [
                "model.pattern=M1 M3:moe L T:moe M2:mlp T:none M1:moe",
                "model.d_model=4096",
                "model.attention.n_heads=32",
            ],
            200,
        ),
    ],
    ids=["d26", "1000 layers", "window", "chunk", "4096 wide"],
)
def test_texts_get_shorter_and_layers_narrower_where_they_are_large(overrides, most):
    """No text is longer than the work allows; what is made smaller stays a layer of its kind and still crosses chunks
    and windows."""

    config = compose_config(overrides)
    layers = list(distinct_layers(config.model.layers))
    plan = make_plan(layers, config.model.d_model)
    assert 2 * plan.chunk < plan.tokens <= most
    for layer in layers:
        applied = plan.apply(layer)
        assert (applied.kind, applied.ffn_kind) == (layer.kind, layer.ffn_kind)
        assert getattr(applied.params, "chunk", 1) <= plan.chunk
        assert (getattr(applied.params, "window", None) or 1) < plan.tokens
        assert applied.params.d_model == plan.width == min(config.model.d_model, 256)


def test_what_was_made_smaller_is_said():
    def head_line(*overrides):
        config = compose_config(list(overrides))
        return gate.head_line(config, Subject.of(config))

    assert "chunks of at most 64" in head_line("model.pattern=M", "model.mamba2.chunk=1024")
    assert "2 distinct of 26 layers, 256 wide instead of 1664" in head_line("model=hybrid_alternating", "size=d26")
    assert "256 wide instead of 4096" in head_line(
        "model.pattern=M1 M3:moe T:moe M2:mlp", "model.d_model=4096", "model.attention.n_heads=32"
    )
    assert gate.line(gate.Row("a", "b", float("nan"), 0.0, "fail", 1.0)).split() == [
        "a",
        "b",
        "nan",
        "0e+00",
        "FAIL",
        "1.0",
    ]

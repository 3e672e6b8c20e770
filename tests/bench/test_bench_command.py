"""``hybridlm bench`` as a user meets it: a table, JSON, and a line for each mistake."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from hybridlm.cli.compose import compose_config
from hybridlm.cli.verbs import app
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run

FAST = ["--contexts", "8,24", "--new-tokens", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_patterns_side_by_side(tiny, tmp_path):
    result = bench(*tiny, "--compare", "T,MT,[T, M]", *FAST, "--batch", "1,2", "--out", "found")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "found/bench.json").read_text())
    points = found["points"]
    assert [(point["model"], point["batch"], point["context"]) for point in points] == [
        (name, batch, context) for batch in (1, 2) for context in (8, 24) for name in ("T", "MT", "[T, M]")
    ]
    for point in points:
        assert point["cache_bytes"] == point["cache_bytes_measured"]
        assert point["decode_tokens_per_s"] > 0
        assert point["prefill_tokens_per_s"] == pytest.approx(
            point["batch"] * point["context"] / point["first_token_s"]
        )
        assert ("decode_ratio" in point) == (point["model"] != "T")
    assert found["settings"]["contexts"] == [8, 24]
    assert found["machine"]["torch"] == torch.__version__
    assert "decode ratio" in result.stdout
    assert len([line for line in result.stdout.splitlines() if " MiB" in line]) == 12


def test_a_trained_run_beside_a_pattern(tiny, tmp_path):
    folder = RunFolder(tmp_path / "outputs/a")
    run(compose_config(tiny), folder, None)
    result = bench("last", "--compare", "M", *FAST, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {point["model"] for point in found["points"]} == {"a, step 12", "M"}
    assert (folder.path / "bench/bench.json").is_file()
    assert bench("last", "model.pattern=T").exit_code == 2


def test_one_model_and_what_is_left_out(tiny):
    result = bench(*tiny, *FAST, "--budget", "0.001", "--contexts", "24,4000", "--new-tokens", "500")
    assert result.exit_code == 0, result.stderr
    assert "over 0.001 s" in result.stdout
    assert "at 24 tokens" in result.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(tiny, tmp_path, dtype):
    """Weights are rounded before they are prepared for decoding, and only those that may be."""
    result = bench(*tiny, "--compare", "T M1 M2 M3 L", *FAST, "--dtype", dtype, "--out", "found")
    assert result.exit_code == 0, result.stderr
    points = json.loads((tmp_path / "found/bench.json").read_text())["points"]
    for point in points:
        width = point["weight_bytes"] / point["parameters"]
        assert width == 4 if dtype == "float32" else 2 < width < 3
        assert point["decode_tokens_per_s"] > 0


def test_what_was_measured_is_shown_where_it_cannot_be_kept(tiny, tmp_path):
    (tmp_path / "found/bench.json").mkdir(parents=True)
    result = bench(*tiny, *FAST, "--out", "found")
    assert result.exit_code == 2
    assert result.stdout.count(" MiB") == 2
    assert "--out found: " in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--contexts", "8,x"], "--contexts '8,x': 'x'"),
        (["--batch", "0"], "--batch '0': "),
        (["--contexts", "1" + "0" * 30], "1,000,000,000"),
        (["--ema"], "--ema: "),
        (["--batch", "1,-2"], "--batch '1,-2': '-2'"),
        (["--compare", "T,Q"], "'Q'"),
        (["--compare", "T,,M"], "--compare T,,M: "),
        (["--compare", "(T"], "model.pattern"),
        (["nowhere"], "nowhere: "),
        (["model.d_modle=3"], "model.d_model?"),
        (["--frob"], "--frob"),
        (["--out", "file/below"], "--out file/below: "),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, said):
    (tmp_path / "file").write_text("")
    result = bench(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(("config error: ", "error: "))
    assert said in line

"""``hybridlm eval`` as a user meets it: tables and eval.json next to the run, other text, probes, and a line for each
mistake."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from typer.testing import CliRunner

from hybridlm.cli.compose import compose_config
from hybridlm.cli.verbs import app
from hybridlm.eval.results import read_records
from hybridlm.runs.resume import Call
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run of 12 steps."""
    folder = RunFolder(tmp_path_factory.mktemp("outputs") / "a")
    overrides = [*tiny, "data.packing=true"]
    run(compose_config(overrides), folder, None, Call(overrides=tuple(overrides)))
    return folder


@pytest.fixture(autouse=True)
def clean(trained):
    trained.evaluation.unlink(missing_ok=True)


def invoked(trained, *arguments):
    return CliRunner().invoke(app, ["eval", str(trained.path), *arguments])


def test_the_loss_is_that_of_training(trained):
    """Side by side the windows are those of the validation at the end of the run, and so are its figures."""
    result = invoked(trained, "--stride", "64", "--json")
    assert result.exit_code == 0, result.stderr
    (record,) = json.loads(result.stdout)
    summary = json.loads(trained.summary.read_text())
    assert record["metrics"]["loss"] == pytest.approx(summary["val/loss"], rel=1e-5)
    assert record["metrics"]["bpb"] == pytest.approx(summary["val/bpb"], rel=1e-5)
    assert record["metrics"]["bytes"] == summary["val_bytes"]
    assert record["metrics"]["ppl"] == pytest.approx(math.exp(record["metrics"]["loss"]))
    assert record["settings"] == {"split": "val", "context": 64, "stride": 64, "limit": None, "data": []}
    assert (record["what"], record["step"], record["checkpoint"]) == ("loss", 12, "step-00000012.ckpt")


def test_results_are_added_and_the_same_measurement_is_replaced(trained):
    assert invoked(trained).exit_code == 0
    assert invoked(trained, "--context", "16,32", "--stride", "16").exit_code == 0
    assert invoked(trained, "--no-loss", "--probes").exit_code == 0
    first = read_records(trained.evaluation)
    assert [record.what for record in first] == ["loss"] * 3 + ["probe/induction", "probe/copying"]
    assert [record.settings["context"] for record in first] == [64, 16, 32, 64, 64]
    assert invoked(trained, "--context", "16", "--stride", "16").exit_code == 0
    again = read_records(trained.evaluation)
    assert sorted(record.key for record in again) == sorted(record.key for record in first)
    assert again[-1].settings["context"] == 16, "the newest stands last"
    assert again[-1].metrics == first[1].metrics


def test_a_table_with_a_curve(trained):
    result = invoked(trained, "--limit", "1")
    assert result.exit_code == 0, result.stderr
    assert "bits/byte" in result.stdout
    assert "does it use its context?" in result.stdout
    assert "33-64" in result.stdout
    assert "eval.json" in result.stderr


def test_other_text_in_the_runs_tokens(trained, corpus):
    result = invoked(trained, "data=files", f"data.path={corpus}/lines.jsonl", "--json")
    assert result.exit_code == 0, result.stderr
    (record,) = json.loads(result.stdout)
    assert record["settings"]["data"] == ["data=files", f"data.path={corpus}/lines.jsonl"]
    own = invoked(trained, "data.val_fraction=0.4", "--json")
    assert own.exit_code == 0, own.stderr
    assert json.loads(own.stdout)[0]["metrics"]["documents"] > 4


def test_all_of_another_text_is_evaluated(trained, tmp_path):
    """One file or many, nothing is held out of it."""
    for number, text in enumerate(("a text of its own\n", "and another one, é\n", "x")):
        (tmp_path / f"{number}.txt").write_text(text * 30, encoding="utf-8")
    for path, files in ((tmp_path / "0.txt", ["0.txt"]), (tmp_path, ["0.txt", "1.txt", "2.txt"])):
        result = invoked(trained, "data=files", f"data.path={path}", "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)[0]["metrics"]
        assert found["documents"] == len(files)
        assert found["bytes"] == sum((tmp_path / name).stat().st_size for name in files)


def test_a_window_longer_than_any_document(trained):
    """Costs no memory, and is the same as any other window that holds them whole."""
    found = [
        json.loads(invoked(trained, "--context", context, "--json").stdout)[0] for context in ("1000000000", "65536")
    ]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["curve"] == found[1]["curve"]


def test_conversations_are_no_text_for_a_base_model(trained, tmp_path):
    (tmp_path / "chat.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes"}]})
            + "\n"
            for n in range(60)
        )
    )
    result = invoked(trained, "data=chat", f"data.path={tmp_path}/chat.jsonl")
    assert result.exit_code == 2
    assert "tokenizer.json" in result.stderr.splitlines()[-1]


def test_the_training_text(trained):
    result = invoked(trained, "--split", "train", "--limit", "2", "--json")
    assert json.loads(result.stdout)[0]["metrics"]["documents"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context", "64,x"], "--context '64,x': 'x'"),
        (["--context", "0"], "--context '0': "),
        (["--num-fewshot", "2"], "--num-fewshot 2: "),
        (["--no-loss", "--probes", "--stride", "2"], "--no-loss"),
        (["data=synthetic"], "data.source = 'synthetic'"),
        (["--stride", "65"], "--stride 65: "),
        (["--stride", "17", "--context", "32,16"], "--context 16"),
        (["--no-loss"], "--no-loss"),
        (["--include-path", "tasks"], "--tasks"),
        (["--probes", "--context", "16", "--no-loss"], "--probes: "),
        (["model.pattern=T"], "model.pattern=T: "),
        (["data.frob=1"], "data.frob"),
        (["--no-loss", "--probes", "data=files", "data.path=x"], "--no-loss"),
        (["--ema"], "callbacks=ema"),
        (["--frob"], "--frob"),
    ],
)
def test_a_mistake_is_one_line(trained, arguments, said):
    result = invoked(trained, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith(("config error: ", "error: "))
    assert said in line
    assert not trained.evaluation.exists()


def test_an_unknown_run():
    result = CliRunner().invoke(app, ["eval", "nowhere"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "nowhere: does not exist" in result.stderr


def test_a_run_whose_data_are_gone_says_what_to_run(trained, tmp_path):
    """Tasks and probes still work."""
    text = trained.config.read_text()
    gone = text.replace(
        next(line for line in text.splitlines() if line.startswith("  path: /")), f"  path: {tmp_path}/gone/*.txt"
    )
    run = RunFolder(tmp_path / "run")
    shutil.copytree(trained.path, run.path)
    run.config.write_text(gone)
    result = invoked(run)
    assert result.exit_code == 2
    assert "gone/*.txt matches no file" in result.stderr
    assert "hybridlm prepare data=files" in result.stderr
    assert "--no-loss" in result.stderr
    assert invoked(run, "--no-loss", "--probes").exit_code == 0


def test_a_tokenizer_that_does_not_match(trained, corpus, tmp_path):
    result = invoked(trained, "data=files", f"data.path={corpus}/*.txt", "data.tokenizer.kind=bpe", "data.tokenizer.path=null",  # noqa: E501
                     "data.tokenizer.vocab_size=300", f"data.out={tmp_path}")  # fmt: skip
    assert result.exit_code == 2, result.output
    assert "tokenizer.json" in result.stderr.splitlines()[-1]


def test_a_damaged_file_of_results_is_not_overwritten(trained):
    trained.evaluation.write_text("{")
    result = invoked(trained)
    assert result.exit_code == 2
    assert "eval.json: not JSON" in result.stderr
    assert trained.evaluation.read_text() == "{"


def test_a_synthetic_task_is_counted_as_in_training(tiny, tmp_path, monkeypatch):
    """Right answers at every length of the validation, and at others that are asked for."""
    folder = RunFolder(tmp_path / "a")
    overrides = [line for line in tiny if not line.startswith("data") and "samples" not in line]
    overrides += [
        "data=synthetic",
        "data.synthetic.task=parity",
        "data.synthetic.eval_lengths=[24]",
        "data.seq_len=16",
        "data.global_batch=4",
    ]
    run(compose_config([*overrides, "data.synthetic.val_examples=20"]), folder, None)
    result = invoked(folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    summary = json.loads(folder.summary.read_text())
    assert [record["settings"]["context"] for record in found] == [16, 24]
    for record in found:
        for name in ("accuracy", "exact", "loss"):
            assert record["metrics"][name] == pytest.approx(
                summary[f"val/{name}/{record['settings']['context']}"], rel=1e-5
            )
    other = invoked(folder, "--context", "40", "--limit", "8", "--batch", "3", "data.synthetic.seed=5")
    assert other.exit_code == 0, other.stderr
    assert "answers/parity, 40 tokens" in other.stdout
    for wrong, field in ((["--probes"], "--probes: "), (["--stride", "8"], "--stride")):
        refused = invoked(folder, *wrong)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.output
        assert field in refused.stderr

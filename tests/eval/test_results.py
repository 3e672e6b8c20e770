"""eval.json, and the summary of the W&B run."""

from __future__ import annotations

import json
import os

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.errors import UserError
from hybridlm.eval.results import Record, add_records, log_to_wandb, read_records
from hybridlm.runs.run_folder import RunFolder


def record(**changes):
    return Record(
        **{"what": "loss", "checkpoint": "step-1.ckpt", "step": 1, "ema": False, "settings": {"split": "val"}}
        | {"metrics": {"bpb": 1.5, "tokens": 7}}
        | changes
    )


def test_records_are_kept_as_they_are_and_the_same_measurement_is_replaced(tmp_path):
    path = tmp_path / "eval.json"
    first, second = record(), record(what="probe/x", metrics={"loss": float("nan")}, curve=[{"length": 32}])
    add_records(path, [first, second])
    assert [one.key for one in read_records(path)] == [first.key, second.key]
    assert read_records(path)[0] == first
    add_records(path, [record(metrics={"bpb": 2.0})])
    assert [one.what for one in read_records(path)] == ["probe/x", "loss"], "the newest is last"
    assert read_records(path)[1].metrics == {"bpb": 2.0}
    add_records(path, [record(ema=True), record(step=2), record(settings={"split": "train"})])
    assert len(read_records(path)) == 5
    written = json.loads(path.read_text())
    assert written["format_version"] == 1
    assert isinstance(written["results"][0]["curve"][0]["length"], int)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("{", "not JSON"),
        ("[]", "mapping"),
        ('{"format_version": 99, "results": []}', "format_version = 99"),
        ('{"format_version": 1, "results": [{"what": 3}]}', "results"),
    ],
)
def test_a_file_that_is_none_is_refused_in_a_line(tmp_path, content, field):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(UserError, match=r"eval\.json") as caught:
        add_records(tmp_path / "eval.json", [record()])
    (line,) = caught.value.problems
    assert field in line
    assert (tmp_path / "eval.json").read_text() == content


def test_results_go_to_the_summary_of_the_wandb_run(tmp_path, monkeypatch):
    """By W&B's public interface, under the id that training left; what fails costs a line."""
    config = compose_config(["logger=wandb", "logger.offline=true", "hardware=cpu"])
    loss = record(settings={"split": "val", "context": 64}, metrics={"bpb": 1.5})
    assert loss.wandb_name == "eval/val/context-64"
    answers = loss.model_copy(update={"what": "answers/mqar", "ema": True})
    assert answers.wandb_name == "eval/answers/mqar/context-64/ema"
    folder = RunFolder(tmp_path)
    said: list[str] = []
    log_to_wandb(config, folder, [loss], said.append)
    assert said == []
    assert not (tmp_path / "wandb").exists(), "the run was never there"
    folder.wandb_id.write_text("abc12345\n")
    updates: dict[str, float] = {}
    begun: dict[str, object] = {}

    class Run:
        summary = updates

        def finish(self):
            begun["finished"] = True

    def init(**arguments):
        begun.update(arguments)
        return Run()

    import wandb

    monkeypatch.setattr(wandb, "init", init)
    log_to_wandb(config, folder, [loss], said.append)
    assert updates == {"eval/val/context-64/bpb": 1.5}
    assert (begun["id"], begun["mode"], begun["finished"]) == ("abc12345", "offline", True)

    def fails(**arguments):
        raise OSError("no network")

    monkeypatch.setattr(wandb, "init", fails)
    log_to_wandb(config, folder, [loss], said.append)
    assert len(said) == 1
    assert "no network" in said[0]


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_a_folder_that_cannot_be_written(tmp_path):
    target = tmp_path / "eval.json" / "nowhere"
    with pytest.raises(UserError, match="cannot be written"):
        add_records(target, [])

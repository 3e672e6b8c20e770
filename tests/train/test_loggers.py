"""Remote loggers: the files come first, and a failure never ends a run; TensorBoard."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.errors import UserError
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train import loggers as loggers_module
from hybridlm.train.loggers import Remote, TensorBoard
from hybridlm.train.run import run


def rows(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


def scalars(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "step" and not isinstance(value, list)}


class Recorder:
    """A backend that remembers what it is told, and fails at a step if it is to."""

    def __init__(self, fails_at: int | None = None, folder: RunFolder | None = None) -> None:
        self.calls: list[tuple] = []
        self._fails_at, self._folder = fails_at, folder

    def start(self):
        self.calls.append(("start",))
        return "begun"

    def log(self, row, step):
        if self._folder is not None:
            last = rows(self._folder)[-1]
            assert last["step"] == step
            assert scalars(last).items() >= row.items(), "the files have it before"
        self.calls.append(("log", step))
        if step == self._fails_at:
            raise ConnectionError("gone\nand more")

    def samples(self, step, prompts, texts):
        self.calls.append(("samples", step, len(texts)))

    def summary(self, summary):
        self.calls.append(("summary", summary["steps"]))

    def close(self):
        self.calls.append(("close",))


def with_backend(monkeypatch, backend) -> None:
    monkeypatch.setattr(loggers_module, "Wandb", lambda *arguments, **settings: backend)


def test_a_remote_logger_gets_every_row_after_the_files_have_it(tiny, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    backend = Recorder(folder=folder)
    with_backend(monkeypatch, backend)
    extra = ["logger=wandb", "model.pattern=MT:moe", "callbacks.samples.every=2"]
    run(compose_config([*tiny, *extra]), folder, None)
    logged = [call[1] for call in backend.calls if call[0] == "log"]
    assert logged == [1, 2, 4, 4, 6, 8, 8, 10, 12, 12]
    assert [call for call in backend.calls if call[0] == "samples"] == [("samples", 8, 3), ("samples", 12, 3)]
    assert backend.calls[0] == ("start",)
    assert backend.calls[-2:] == [("summary", 12), ("close",)]


def test_a_remote_logger_that_fails_is_reported_once_and_dropped(tiny, tmp_path, monkeypatch, capsys):
    backend = Recorder(fails_at=4)
    with_backend(monkeypatch, backend)
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "logger=wandb"]), folder, None)
    assert rows(folder)[-1]["step"] == 12
    assert folder.summary.exists()
    assert [call[1] for call in backend.calls if call[0] == "log"] == [1, 2, 4]
    lines = [line for line in capsys.readouterr().out.splitlines() if "ConnectionError" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning     ")
    assert "recorder" in lines[0]
    assert lines[0].endswith("ConnectionError: gone")


def test_a_run_that_fails_closes_its_remote_logger(tiny, tmp_path, monkeypatch):
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


def test_a_remote_logger_starts_with_the_first_row():
    backend = Recorder()
    Remote(backend, print).close()
    assert backend.calls == []


@pytest.mark.parametrize(
    ("logger", "says"), [("wandb", "pip install wandb"), ("tensorboard", r"pip install 'hybridlm\[tensorboard\]'")]
)
def test_a_missing_package_is_refused_in_one_line_and_leaves_no_folder(tiny, tmp_path, monkeypatch, logger, says):
    monkeypatch.setattr(loggers_module.importlib.util, "find_spec", lambda name: None)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=says) as refused:
        run(compose_config([*tiny, f"logger={logger}"]), folder, None)
    assert len(refused.value.problems) == 1
    assert not folder.path.exists()


# ---- TensorBoard, whose package need not be here


def test_tensorboard_gets_scalars_and_texts(tmp_path, monkeypatch):
    calls: list[tuple] = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("begin", folder, purge_step))

        def __getattr__(self, name):
            return lambda *arguments, **named: calls.append((name, arguments, named))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert torch.utils is not None
    remote = Remote(TensorBoard(tmp_path, 8), print)
    remote.log_metrics({"train/loss": 1.0, "moe/0/load": [3.0, 1.0]}, step=10)
    remote.samples(10, ["a"], ["abc"])
    remote.summary({"steps": 10})
    remote.close()
    assert calls[0] == ("begin", str(tmp_path), 9)
    assert ("add_scalar", ("train/loss", 1.0, 10), {}) in calls
    assert calls[-1][0] == "close"

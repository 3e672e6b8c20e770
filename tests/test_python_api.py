"""``import hybridlm``: fast and without torch; the examples of docs/python.md run; a process stays as it was."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import math
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import hybridlm
from hybridlm.runs.run_folder import RunFolder

DOCUMENT = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.fixture
def config(tiny):
    lines = [line for line in tiny if "samples" not in line]
    return hybridlm.compose([*lines, "callbacks=none", "trainer.max_steps=2", "trainer.val_every=null"])


def test_importing_takes_milliseconds_and_no_torch():
    code = (
        "import sys, time; began = time.perf_counter(); import hybridlm; took = time.perf_counter() - began;"
        "heavy = {'torch', 'lightning', 'hydra', 'pydantic', 'numpy'} & set(sys.modules);"
        "print(took, *heavy); assert 'train' in dir(hybridlm)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds = [float(run.stdout.split()[0]) for run in runs]
    assert [run.stdout.split()[1:] for run in runs] == [[]] * 3
    assert min(seconds) < 0.05


def test_names():
    assert hybridlm.__version__ == importlib.metadata.version("hybridlm")
    assert all(getattr(hybridlm, name) is not None for name in hybridlm.__all__)
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = hybridlm.nothing_of_ours
    assert (Path(hybridlm.__file__).parent / "py.typed").is_file()


def test_the_examples_run(corpus, tmp_path, monkeypatch, capsys):
    """In order, in one namespace; on a small text."""
    monkeypatch.chdir(tmp_path)
    small = ["data=files", f"data.path={corpus}/*.txt", "data.tokenizer.kind=bytes", "data.val_fraction=0.2"]
    small += ["data.seq_len=32", "data.global_batch=4", f"data.out={tmp_path}/data", "hardware=cpu"]
    compose = hybridlm.compose
    monkeypatch.setattr(hybridlm, "compose", lambda overrides: compose([*overrides, *small]), raising=False)
    examples = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(examples) == 7
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(DOCUMENT), "exec"), names)
    said = capsys.readouterr().out
    assert "model.patern" in said
    assert "optim.lr" in said
    assert names["run"].summary["steps"] == 6


def test_a_run_in_a_thread_leaves_the_process_as_it_was(config, tmp_path):
    """As in a notebook whose cells run in a thread of their own."""
    place = tmp_path / "run"

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        levels = [logging.getLogger(name).level for name in ("lightning", "lightning.pytorch")]
        draws = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return handlers, levels, warnings.filters[:], torch.get_num_threads(), *draws

    hybridlm.train(config, tmp_path / "first")  # imports once and for all
    before, results = state(), []
    thread = threading.Thread(target=lambda: results.append(hybridlm.train(config, place)))
    thread.start()
    thread.join()
    assert state() == before
    (run,) = results
    assert run.folder == place
    assert run.summary == json.loads(RunFolder(place).summary.read_text())
    hybridlm.train(config, tmp_path / "third")  # in the main thread
    assert state() == before


def test_runs_started_in_the_same_second_get_folders_of_their_own(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("hybridlm.train.run"), "run", lambda *arguments: {})
    first, second = hybridlm.train(config), hybridlm.train(config)
    assert first.folder != second.folder


def test_mistakes_are_exceptions(config, tmp_path):
    with pytest.raises(hybridlm.ConfigError) as caught:
        hybridlm.compose(["model.d_model=x", "sed=3"])
    assert len(caught.value.problems) == 2
    with pytest.raises(hybridlm.UserError, match="nowhere"):
        hybridlm.load(tmp_path / "nowhere")
    with pytest.raises(hybridlm.UserError, match=r"data\.path"):
        hybridlm.train(config.model_copy(update={"data": config.data.model_copy(update={"path": "none/*.txt"})}))
    two = config.model_copy(update={"trainer": config.trainer.model_copy(update={"devices": 2})})
    with pytest.raises(hybridlm.ConfigError, match=r"trainer\.devices"):
        hybridlm.train(two, tmp_path / "two")
    with pytest.raises(hybridlm.ConfigError, match="ckpt"):
        hybridlm.train(config.model_copy(update={"ckpt": "last"}), tmp_path / "two")
    assert list(tmp_path.iterdir()) == []


def test_loss_is_that_of_one_forward_pass(config, tmp_path, monkeypatch):
    hybridlm.train(config, tmp_path / "run")
    trained = hybridlm.load(tmp_path / "run", device="cpu")
    text = "def f(x):\n    return x\n"
    ids = torch.tensor([[trained.tokenizer.eos_id, *trained.tokenizer.encode(text)]])
    logits = trained.model(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert trained.loss(text) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("hybridlm.api._CHUNK", 5)
    assert trained.loss(text) == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(trained.loss("d"))
    with pytest.raises(hybridlm.UserError):
        trained.loss("")
    assert trained.generate("def", max_new_tokens=5, seed=1) == trained.generate("def", max_new_tokens=5, seed=1)

"""Whole runs, as a user starts them: what they leave behind, what a kill leaves behind, resume, several processes,
generate."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import forked, run_ranks

from hybridlm.cli.compose import compose_config
from hybridlm.cli.start import main
from hybridlm.cli.verbs import run_app
from hybridlm.config.load import from_yaml
from hybridlm.data.preparing.prepare import prepare
from hybridlm.errors import UserError
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.runs.checkpoint import load_run, read_checkpoint
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(TRAIN), *arguments]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> RunFolder:
    """A finished run of 12 steps."""
    folder = RunFolder(tmp_path_factory.mktemp("run") / "a")
    run(compose_config(tiny), folder, None)
    return folder


def test_a_run_leaves_what_it_promises(finished, tiny):
    config = compose_config(tiny)
    assert from_yaml(finished.config.read_text()) == config
    assert [row["step"] for row in rows(finished.path)] == [1, 2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows(finished.path) if "val/bpb" in row] == [4, 8, 12]
    assert all(row["data/tokens"] == row["step"] * 4 * 32 for row in rows(finished.path))
    assert sorted(path.name for path in finished.checkpoints.iterdir()) == [
        "best-00000012.ckpt",
        "step-00000008.ckpt",
        "step-00000012.ckpt",
    ]
    assert "mamba2" in finished.layers.read_text()
    assert "attention" in finished.layers.read_text()
    samples = finished.samples.read_text().split("\n\n----------------\n\n")
    assert [
        text.startswith(prompt) for text, prompt in zip(samples, config.callbacks.samples.prompts, strict=True)
    ] == [True] * 3
    summary = json.loads(finished.summary.read_text())
    assert summary["model"] == config.model.name
    assert summary["steps"] == 12
    assert summary["val/bpb"] == pytest.approx(rows(finished.path)[-1]["val/bpb"])


def test_training_learns(finished):
    losses = [row["train/loss"] for row in rows(finished.path)]
    assert losses[0] == pytest.approx(math.log(257), abs=0.2)
    assert losses[-1] < losses[0] - 0.3


def test_bits_per_byte_are_those_of_the_saved_model_on_the_held_out_text(finished, tiny):
    """From the checkpoint alone, one document-free pass with the cache: another path than the validation loop's."""
    loaded = load_run(str(finished.path), torch.device("cpu"))
    (part,) = prepare(compose_config(tiny).data).parts
    tokens = torch.from_numpy(part.val.stream.read(0, len(part.val.stream)))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 64):
            window = tokens[start : start + 65]
            logits = loaded.model(window[None, :-1]).logits[0].double()
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    bpb = nats / math.log(2) / part.val.text_bytes
    assert json.loads(finished.summary.read_text())["val/bpb"] == pytest.approx(bpb, rel=1e-5)


@pytest.mark.parametrize(
    "extra",
    [["optim=adamw"], ["trainer.accumulate=2", "optim=muon"], ["optim=lion"], ["trainer.accumulate=2", "optim=sgd"]],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tiny, tmp_path, extra):
    config = compose_config([*tiny, *extra])
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, whole, None)
    shutil.copytree(whole.path, broken.path)
    broken.step_checkpoint(12).unlink()
    with broken.metrics_jsonl.open("a") as file:
        file.write('{"step": 14, "tra')  # what a kill may leave
    run(config, broken, broken.step_checkpoint(8))
    exact = ("step", "train/loss", "val/bpb", "val/loss", "optim/lr", "optim/grad_norm", "data/tokens")
    assert [{key: row.get(key) for key in exact} for row in rows(broken.path)] == [
        {key: row.get(key) for key in exact} for row in rows(whole.path)
    ]
    ours, theirs = (read_checkpoint(folder.step_checkpoint(12)) for folder in (broken, whole))
    assert all(torch.equal(ours["state_dict"][name], tensor) for name, tensor in theirs["state_dict"].items())
    for mine, its in zip(
        ours["optimizer_states"][0]["state"].values(), theirs["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[name], tensor) for name, tensor in its.items())


def test_steps_cut_in_another_way_are_not_resumed(finished, tiny):
    with pytest.raises(UserError, match=r"resume with trainer\.accumulate=1"):
        run(
            compose_config([*tiny, "trainer.max_steps=14", "trainer.accumulate=2"]),
            finished,
            finished.newest_checkpoint(),
        )
    assert [row["step"] for row in rows(finished.path)][-1] == 12


def test_another_tokenizer_is_not_resumed(finished, tiny):
    before = finished.tokenizer.read_text()
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        run(
            compose_config([*tiny, "trainer.max_steps=14", "data.tokenizer.kind=bpe"]),
            finished,
            finished.newest_checkpoint(),
        )
    assert finished.tokenizer.read_text() == before


def test_a_finished_run_needs_more_steps_to_go_on(finished, tmp_path, tiny):
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(finished.path, folder.path)
    with pytest.raises(UserError, match="already at step 12"):
        run(compose_config(tiny), folder, folder.newest_checkpoint())
    run(compose_config([*tiny, "trainer.max_steps=14"]), folder, folder.newest_checkpoint())
    assert [row["step"] for row in rows(folder.path)][-2:] == [12, 14]
    assert [path.name for path in folder.step_checkpoints()] == ["step-00000014.ckpt", "step-00000012.ckpt"]


def test_kill_and_resume_in_the_same_folder(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    process = forked(main, [*tiny, "trainer.max_steps=100000", "trainer.val_every=null"])
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("outputs/*/*/checkpoints/step-*.ckpt")):
            assert time.monotonic() < deadline
            assert process.is_alive()
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    (folder,) = tmp_path.glob("outputs/*/*/")
    stopped_at = int(RunFolder(folder).newest_checkpoint().stem.removeprefix("step-"))
    main(["ckpt=last", f"trainer.max_steps={stopped_at + 4}"])
    assert f"resuming after step {stopped_at}" in capsys.readouterr().out
    assert list(tmp_path.glob("outputs/*/*/")) == [folder]
    steps = [row["step"] for row in rows(folder)]
    assert steps == sorted(set(steps))
    assert steps[-1] == stopped_at + 4


# eps is large because AdamW's first step is the gradient's sign: where a gradient is all rounding, it is a coin's.
THREE_STEPS = ["optim=adamw", "optim.eps=1e-3", "trainer.max_steps=3", "trainer.log_every=1"]


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("ranks") / "one")
    run(compose_config([*tiny, *THREE_STEPS]), folder, None)
    return folder


def assert_the_same_run(two: Path, one: RunFolder) -> None:
    for mine, its in zip(rows(two), rows(one.path), strict=True):
        assert mine["train/loss"] == pytest.approx(its["train/loss"], rel=1e-5)
        assert mine["optim/grad_norm"] == pytest.approx(its["optim/grad_norm"], rel=1e-4)
    weights = load_run(str(two), torch.device("cpu")).model.state_dict()
    for name, tensor in load_run(str(one.path), torch.device("cpu")).model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_two_processes_train_as_one(tiny, one_process, tmp_path, environment):
    """Through the command line, so that the start of the second process is part of it."""
    arguments = [*tiny, *THREE_STEPS, "trainer.devices=2", f"hydra.run.dir={tmp_path}/two"]
    done = subprocess.run(command(*arguments), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_the_same_run(tmp_path / "two", one_process)


def test_two_sharding_processes_of_a_launcher_train_as_one(tiny, one_process, tmp_path):
    arguments = [*tiny, *THREE_STEPS, "trainer.devices=2", "trainer.strategy=fsdp2", f"hydra.run.dir={tmp_path}/two"]
    assert run_ranks(lambda rank, port: main(arguments)) == [0, 0]
    assert_the_same_run(tmp_path / "two", one_process)


def test_a_sweep_runs_every_job_and_headless_prints_json(tiny, tmp_path, monkeypatch, capfd):
    """One of the three jobs is misconfigured: the others run, and the sweep ends with code 2."""
    base = [item for item in tiny if not item.startswith("model.pattern=")]
    arguments = ["-m", *base, "model.pattern=T,Q,(MT)*1", "trainer.headless=true", "trainer.max_steps=2"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capfd.readouterr()
    assert end.value.code == 2, said.err[-2000:]
    assert "Traceback" not in said.err
    assert "'Q'" in said.err
    folders = sorted(path.parent for path in tmp_path.glob("multirun/*/*/*/summary.json"))
    assert [folder.name for folder in folders] == ["0", "2"]
    printed = [json.loads(line) for line in said.out.splitlines() if line.startswith("{")]
    assert [row["step"] for row in printed if "train/loss" in row] == [1, 2, 1, 2]


def test_a_card_that_is_not_here_is_refused_in_one_line(tiny, tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as end:
        main([*tiny, "hardware=rtx3070", f"hydra.run.dir={tmp_path}/run"])
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "rtx3070" in line
    assert "needs a CUDA device" in line


def test_generate_streams_the_same_text_for_the_same_seed(finished, capfdbinary):
    def text(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            run_app(["generate", str(finished.path), "--prompt", "def f", "-n", "20", *arguments])
        assert end.value.code is None
        return capfdbinary.readouterr().out.decode("utf-8", "replace")

    first = text("--seed", "1")
    assert first.startswith("def f")
    assert len(first) > len("def f\n")
    assert first == text("--seed", "1")
    assert first != text("--seed", "2")


def test_decode_is_the_argmax_of_the_full_forward(finished):
    loaded = load_run(str(finished.path), torch.device("cpu"))
    prompt = loaded.tokenizer.encode("def f1(x):\n    return")
    (written,) = Engine(loaded.model, loaded.tokenizer).generate([prompt], Sampling(temperature=0, max_new_tokens=30))
    ids = written.ids
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt + ids])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["nowhere"], "does not exist"), (["last"], "no run under"), (["FOLDER", "--prompt", ""], "--prompt: empty")],
)
def test_generate_refuses_in_one_line(finished, tmp_path, monkeypatch, capfd, arguments, says):
    monkeypatch.chdir(tmp_path)
    line = [str(finished.path) if item == "FOLDER" else item for item in arguments]
    with pytest.raises(SystemExit) as end:
        run_app(["generate", *line, *([] if "--prompt" in line else ["--prompt", "a"])])
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert says in line


def test_a_damaged_checkpoint_and_a_foreign_tokenizer_are_refused(finished, tmp_path):
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(finished.path, folder.path)
    newest = folder.newest_checkpoint()
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.raises(UserError, match="no checksum"):
        load_run(str(newest), torch.device("cpu"))
    text = folder.tokenizer.read_text()
    folder.tokenizer.write_text(text.replace("<|endoftext|>", "<|another|>"))
    with pytest.raises(UserError):
        load_run(str(folder.path), torch.device("cpu"))

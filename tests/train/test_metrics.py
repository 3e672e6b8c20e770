"""Metrics: each step once in metrics.jsonl and metrics.csv, names as documented, figures that fit together; W&B's
panels."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.metrics import COLUMNS, MetricsCallback
from hybridlm.train.run import run
from hybridlm.train.run_files import RunFiles

ROOT = Path(__file__).resolve().parents[2]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_of_one_step_share_a_line(tmp_path):
    files = RunFiles(tmp_path / "m.jsonl", tmp_path / "m.csv", resume_step=None, say=print)
    files.log_metrics({"train/loss": 3.0}, step=10)
    files.log_metrics({"val/bpb": 2.0}, step=10)
    files.log_metrics({"train/loss": 2.5}, step=20)
    assert rows(tmp_path / "m.jsonl") == [
        {"step": 10, "train/loss": 3.0, "val/bpb": 2.0},
        {"step": 20, "train/loss": 2.5},
    ]
    table = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert [(row["step"], row["train/loss"], row["val/bpb"]) for row in table] == [
        ("10", "3.0", "2.0"),
        ("20", "2.5", ""),
    ]
    assert tuple(table[0]) == COLUMNS


def test_a_resume_drops_the_steps_after_its_checkpoint_and_a_torn_last_line(tmp_path):
    path, table = tmp_path / "m.jsonl", tmp_path / "m.csv"
    first = RunFiles(path, table, resume_step=None, say=print)
    for step in (10, 20, 30):
        first.log_metrics({"train/loss": float(step)}, step=step)
    with path.open("a") as file:
        file.write('{"step": 40, "tra')
    second = RunFiles(path, table, resume_step=20, say=print)
    second.log_metrics({"train/loss": 31.0}, step=30)
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert [row["step"] for row in csv.DictReader(table.open())] == ["10", "20", "30"]


def test_a_new_run_starts_empty(tmp_path):
    RunFiles(tmp_path / "m.jsonl", tmp_path / "m.csv", resume_step=None, say=print)
    assert (tmp_path / "m.jsonl").read_text() == ""
    assert (tmp_path / "m.csv").read_text() == ",".join(COLUMNS) + "\n"


# ---- docs/metrics.md


def documented() -> set[str]:
    rows = (ROOT / "docs/metrics.md").read_text(encoding="utf-8").splitlines()
    return {match[1] for row in rows if (match := re.match(r"\| `([^`]+)` \|", row))}


def general(name: str) -> str:
    """A logged name as the documentation writes it."""
    name = re.sub(r"^(moe|ssm)/\d+/", r"\1/LAYER/", name)
    name = re.sub(r"^probe/(induction|copying)/", "probe/PROBE/", re.sub(r"^(val/\w+)/\d+$", r"\1/LENGTH", name))
    return re.sub(r"^optim/lr/(matrix|vector|embedding|head)$", "optim/lr/ROLE", name)


def test_what_is_documented_is_logged_and_what_is_logged_is_documented(tiny, tmp_path):
    extra = [
        "model.pattern=MT:moe",
        "callbacks=ema",
        "hardware.peak_tflops.fp32=0.5",
        "callbacks.samples.prompts=[]",
        "trainer.max_steps=6",
    ]
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, *extra, "callbacks.probes.every=1"]), folder, None)
    logged = rows(folder.metrics_jsonl)
    task = [line for line in tiny if not line.startswith("data")]
    generated = RunFolder(tmp_path / "generated")
    run(
        compose_config(
            [*task, "data=synthetic", "data.global_batch=4", "data.synthetic.val_examples=8", "callbacks=none"]
        ),
        generated,
        None,
    )
    pairs = [{"prompt": f"{i}", "chosen": f"{i}", "rejected": f"{i + 1}"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    preferred = [line for line in tiny if line.startswith(("hardware", "trainer", "data.out", "data.global"))]
    preferred += ["optim=dpo", "data=preferences", f"data.path={tmp_path}/pairs.jsonl", "data.val_fraction=0.3"]
    preferences = RunFolder(tmp_path / "preferences")
    run(compose_config([*preferred, f"init_from={folder.path}", "data.seq_len=16", "callbacks=ema"]), preferences, None)
    every = [*logged, *rows(generated.metrics_jsonl), *rows(preferences.metrics_jsonl)]
    assert {general(name) for row in every for name in row} == documented()
    groups = {"step", "train", "val", "optim", "perf", "data", "moe", "ssm", "probe"}
    assert {name.split("/")[0] for row in every for name in row} == groups
    assert {general(name) for name in COLUMNS} <= documented()
    check_figures(logged, folder)


def check_figures(logged, folder):
    """The derived metrics, by hand from the others."""
    summary = json.loads(folder.summary.read_text())
    assert (
        summary["val_seconds"] > sum(row.get("perf/val_s", 0.0) for row in logged) > 0
    )  # and the last one, on all held-out text
    for row in logged:
        assert row["data/tokens"] == row["step"] * 128
        if "train/loss" in row:
            assert row["train/ppl"] == pytest.approx(math.exp(row["train/loss"]))
            assert row["perf/flops_per_s"] == pytest.approx(
                row["perf/tokens_per_s"] * summary["train_flops_per_token"], rel=1e-2
            )
            assert row["perf/mfu"] == pytest.approx(row["perf/flops_per_s"] / 0.5e12)
            assert 0 < row["perf/memory_gb"] < 64
        if "val/loss" in row:
            assert row["val/ppl"] == pytest.approx(math.exp(row["val/loss"]))
    first, second = (next(row for row in logged if row["step"] == step) for step in (2, 4))
    steps = 2 * (second["perf/step_s"] + second["perf/data_s"])
    assert second["perf/tokens_per_s"] == pytest.approx(2 * 128 / steps, rel=1e-2)
    assert second["data/epoch"] == pytest.approx(2 * first["data/epoch"])
    assert [row["step"] for row in logged if "perf/ckpt_s" in row] == [6], "that of step 4 was written after its row"


def test_bits_per_byte_of_a_training_step_are_those_of_its_text(tiny, tmp_path):
    """A byte tokenizer: one target is one byte, the id that ends a document is none."""
    seen = []

    class Spy(MetricsCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch["targets"])
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridlm.train.callbacks.MetricsCallback", Spy)
        folder = RunFolder(tmp_path / "run")
        changes = [
            "trainer.max_steps=2",
            "trainer.accumulate=2",
            "trainer.val_every=null",
            "callbacks=none",
            "trainer.log_every=1",
        ]
        run(compose_config([*tiny, *changes]), folder, None)
    assert len(seen) == 4
    for row, (one, two) in zip(rows(folder.metrics_jsonl), (seen[:2], seen[2:]), strict=True):
        targets = torch.cat([one, two])
        text = int(((targets >= 0) & (targets < 256)).sum())
        assert row["train/bpb"] == pytest.approx(row["train/loss"] * targets.numel() / math.log(2) / text)


def test_a_step_without_a_target_has_no_loss_and_changes_nothing(tiny, tmp_path, capsys):
    """Conversations of long questions and short answers, in short windows."""
    chats = [{"prompt": f"{number} and all " * 4, "response": "ok"} for number in range(30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    folder = RunFolder(tmp_path / "run")
    settings = [
        "data=chat",
        f"data.path={tmp_path}/chats.jsonl",
        "data.global_batch=1",
        "data.val_seq_len=32",
        "trainer.log_every=1",
    ]
    text = [
        line for line in tiny if not line.startswith(("data=", "data.path=", "data.global_batch=", "data.val_seq_len="))
    ]
    run(compose_config([*text, *settings, "callbacks=none"]), folder, None)
    steps = [row for row in rows(folder.metrics_jsonl) if "optim/lr" in row]
    empty = [row for row in steps if not row["data/targets"]]
    assert 0 < len(empty) < len(steps) == 12
    assert {"train/loss" in row for row in empty} == {False}
    assert {row["optim/grad_norm"] for row in empty} == {0.0}
    assert all(row["train/loss"] > 0 for row in steps if row["data/targets"])
    assert {row["optim/skipped_steps"] for row in steps} == {0}
    assert capsys.readouterr().out.count("no targets in its windows") == len(empty)
    assert json.loads(folder.summary.read_text())["val/loss"] > 0


def test_no_peak_no_mfu(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    run(compose_config([*tiny, "trainer.max_steps=1", "trainer.val_every=null", "callbacks=none"]), folder, None)
    assert "perf/mfu" not in rows(folder.metrics_jsonl)[0]
    assert json.loads(folder.summary.read_text())["mfu"] is None


# ---- the W&B workspace


def test_the_workspace_is_planned_without_network_or_package_and_names_documented_metrics():
    script = [sys.executable, str(ROOT / "docs/wandb_workspace.py"), "--project", "p"]
    done = subprocess.run([*script, "--dry-run"], capture_output=True, text=True, check=True)
    planned = json.loads(done.stdout)
    panels = [panel for section in planned["sections"] for panel in section["panels"]]
    assert planned["project"] == "p"
    assert {panel["x"] for panel in panels} == {"data/tokens"}
    named = {general(name) for panel in panels for name in panel.get("y", [])}
    assert named <= documented()
    for panel in panels:
        if "metric_regex" in panel:
            assert any(re.fullmatch(panel["metric_regex"], name) for name in documented())
    assert subprocess.run(script, capture_output=True, text=True).returncode == 2, "no --entity"

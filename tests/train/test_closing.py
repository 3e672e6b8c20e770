"""What a run prints at its end: quality, speed, and commands that resume it."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

import pytest

from hybridlm.runs.resume import Call
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.closing import ending, go_on, name_of, report
from hybridlm.train.stopping import Stopped

SUMMARY = {
    "steps": 10,
    "val/bpb": 1.25,
    "val_bytes": 50_000,
    "gzip_bpb": 2.5,
    "xz_bpb": None,
    "tokens_per_s": 1234.0,
    "seconds": 100.0,
    "step_seconds": 75.0,
    "data_seconds": 5.0,
    "val_seconds": 15.0,
    "ckpt_seconds": 2.0,
    "flops_per_s": 3e9,
    "mfu": 0.5,
    "memory_gb": 1.5,
}


def printed(summary: dict) -> str:
    lines: list[str] = []
    report(SimpleNamespace(say=lines.append), summary, ["hint"])
    return "\n".join(lines)


def test_the_report_of_a_text_model():
    text = printed(SUMMARY)
    for part in ("1.2500", "50 kB", "gzip -9 2.5000", "1,234 tokens/s", "3.0 GFLOP/s", "50%", "1.5 GiB", "hint"):
        assert part in text
    assert "xz" not in text
    assert [part in text for part in ("75%", "5%", "15%", "2%")] == [True] * 4


def test_the_report_of_a_synthetic_task_is_by_length():
    accuracy = {
        f"val/{name}/{length}": value
        for length, name, value in (
            (64, "accuracy", 0.5),
            (64, "exact", 0.25),
            (128, "accuracy", 0.4),
            (128, "exact", 0.1),
        )
    }
    text = printed({**{name: value for name, value in SUMMARY.items() if name != "val/bpb"}, **accuracy, "mfu": None})
    assert "50.00% (25.00%) at 64 tokens, 40.00% (10.00%) at 128 tokens" in text


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "outputs/a run")
    folder.checkpoints.mkdir(parents=True)
    folder.config.write_text("")
    return folder


def test_a_run_is_resumed_by_its_name_or_started_again_with_all_it_was_given(folder, tmp_path):
    call = Call(overrides=("optim.lr=1e-3",))
    again = go_on(call, folder)
    assert again.startswith("python train.py optim.lr=1e-3 ckpt=auto ")
    assert "outputs/a run" in again
    folder.step_checkpoint(3).touch()
    assert go_on(call, folder) == "python train.py ckpt=last"
    (tmp_path / "outputs/b").mkdir()
    (tmp_path / "outputs/b/config.yaml").write_text("")
    assert name_of(folder) == "outputs/a run"
    assert shlex.split(go_on(call, folder))[2:] == ["ckpt='outputs/a run'"]


@pytest.mark.parametrize("end", [Stopped(143, "SIGTERM"), KeyboardInterrupt()])
def test_an_interrupted_run_prints_how_to_resume_it(folder, end):
    said, closed = [], []
    console = SimpleNamespace(say=said.append, close=lambda: closed.append(True))

    def interrupted() -> None:
        with ending(console, console, SimpleNamespace(global_step=7), folder, Call()):
            raise end

    with pytest.raises(type(end)):
        interrupted()
    (line,) = said
    assert "step 7" in line
    assert go_on(Call(), folder) in line
    assert ("SIGTERM" in line) == isinstance(end, Stopped)
    assert closed

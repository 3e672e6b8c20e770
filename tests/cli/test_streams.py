"""Standard streams: letters that cannot be shown, readers that go away, disks that are full, streams that were
closed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import forked

from hybridlm.cli.start import main
from hybridlm.cli.verbs import run_app
from hybridlm.runs.run_folder import RunFolder

HAN = "春眠不觉晓。处处闻啼鸟。夜来风雨声。花落知多少。🐉 "
WRITER = """
import sys
from pathlib import Path
from hybridlm.cli.user_error import reported
with reported(sys.argv[1]):
    for number in range(50_000):
        print("line", number)
    Path(sys.argv[2]).touch()
"""


def write(*words: str, tmp_path: Path, stdout: object = subprocess.PIPE) -> subprocess.Popen[str]:
    line = [sys.executable, *words[:-1], "-c", WRITER, words[-1], str(tmp_path / "done")]
    return subprocess.Popen(line, stdout=stdout, stderr=subprocess.PIPE, text=True)  # type: ignore[call-overload]


@pytest.mark.parametrize("words", [("ends",), ("-u", "ends"), ("continues",), ("-u", "continues")])
def test_a_reader_that_goes_away_ends_what_only_prints_and_nothing_else(tmp_path, words):
    process = write(*words, tmp_path=tmp_path)
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    assert (tmp_path / "done").exists() == (words[-1] == "continues")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("lost", "code"), [("ends", 1), ("continues", 0)])
def test_a_full_disk_behind_a_redirection(tmp_path, lost, code):
    with open("/dev/full", "w") as full:
        process = write(lost, tmp_path=tmp_path, stdout=full)
    assert process.wait(timeout=60) == code
    lines = process.stderr.read().splitlines()
    assert [line.startswith("error: <stdout>: No space left on device; free some space") for line in lines] == [
        True
    ] * code
    assert (tmp_path / "done").exists() == (lost == "continues")


@pytest.mark.skipif(os.name != "posix", reason="a shell")
def test_closed_streams_are_empty_ones(tmp_path):
    script = 'exec "$0" -c "$1" "$2" "$3" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", script, sys.executable, WRITER, "ends", str(tmp_path / "done")], timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "done").exists()


def test_training_goes_on_behind_a_closed_pipe(tiny, tmp_path):
    """Both streams, as behind `2>&1 | head -1`."""
    reader, writer = os.pipe()

    def train() -> None:
        os.closerange(reader, writer + 1)
        main([*tiny, f"hydra.run.dir={tmp_path}/run"])

    process = forked(train, output=writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as lines:
        assert lines.readline()
    process.join(120)
    assert process.exitcode == 0
    folder = RunFolder(tmp_path / "run")
    assert json.loads(folder.summary.read_text())["steps"] == 12
    assert [json.loads(line)["step"] for line in folder.metrics_jsonl.read_text().splitlines()] == [
        1,
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    assert folder.step_checkpoint(12).exists()
    assert folder.samples.exists()


@pytest.fixture(scope="module")
def han(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("han")
    for number in range(20):
        (folder / f"{number:02d} 春.txt").write_text(HAN * (10 + number), encoding="utf-8")
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_that_a_stream_cannot_show_are_replaced_everywhere(tiny, tmp_path, han, monkeypatch, encoding):
    """A run on Chinese text, and every verb that shows some of it."""
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str, stdin: str = "") -> str:
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err := io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict"))
        with pytest.raises(SystemExit) as end:
            run_app(arguments)
        for stream in (out, err):
            stream.flush()
        errors = err.buffer.getvalue().decode(encoding)
        assert end.value.code in (0, None), errors
        return out.buffer.getvalue().decode(encoding) + errors

    data = [
        *tiny,
        f"data.path='{han}/*.txt'",
        f"data.out={tmp_path}/prepared",
        "trainer.max_steps=4",
        "model.name='春'",
    ]
    run = str(tmp_path / "跑")
    shown = said("train", *data, f"hydra.run.dir='{run}'", "callbacks.samples.prompts=['春眠']")
    assert "\nsample 1\n    ??" in shown
    assert "20 documents" in said("prepare", *data, "--show", "1")
    assert "??" in said("generate", run, "--prompt", "春眠", "-n", "8")
    assert json.loads(said("generate", run, "--prompt", "春眠", "-n", "8", "--json"))["prompt"] == "春眠"
    assert "?" in said("chat", run, "-n", "8", stdin="春眠\n/quit\n")
    assert "bits" in said("eval", run)
    assert "?" in said("report", run)
    assert "2 jobs" in said("sweep", *data, "seed=1,2", "--dry-run", f"hydra.sweep.dir='{run}-扫'")
    assert "26.33k parameters" in said("plan", *data)
    assert "python" in said("doctor").lower()

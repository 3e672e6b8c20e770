"""benchmarks/gpu_check.py where there is no GPU: what it says, that its code runs, and that what fails stays a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu_check.py"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    return gpu_check


def part(check, measure, cases=("a", "b"), **settings):
    from gpu.part import Part

    return Part("example", "an example", 60, lambda setting: list(cases), measure, **settings)


def rows_of(check, tmp_path, measure, cases=("a", "b")):
    from gpu.setting import Setting

    target = tmp_path / "rows.jsonl"
    check.work(Setting(dry=True, quick=False), part(check, measure, cases), list(cases), target)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_without_a_gpu_it_says_what_it_would_do(check, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert check.main() == 0
    said = capsys.readouterr().out
    for name, one in check.PARTS.items():
        assert f"\n{name} (at most {one.seconds} s): {one.what}" in said
        assert all(bar.what in said and bar.bound in said for bar in one.bars)
    assert "    hybrid_alternating d26 2048 24\n" in said
    assert "    eager 16384\n" in said


def test_it_fits_its_time(check):
    seconds = [one.seconds for one in check.PARTS.values()]
    assert sum(seconds) <= 25 * 60
    assert max(seconds) <= 9 * 60


def test_an_unknown_part_is_named(check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "decode,speed"])
    with pytest.raises(SystemExit) as end:
        check.main()
    assert end.value.code == 2
    assert "no part speed; there are tests, memory, slm" in capsys.readouterr().err


def test_what_fails_is_a_row_and_the_rest_goes_on(check, tmp_path):
    from harness.turns import LeftOut

    def measure(setting, case):
        if case == "broken":
            raise RuntimeError("\nout of everything\nand a long trace")
        if case == "missing":
            raise LeftOut("no such package")
        yield {"case": case, "value": 1.0}

    rows = rows_of(check, tmp_path, measure, ("broken", "a", "missing", "b"))
    assert rows == [
        {"case": "broken", "error": "RuntimeError: out of everything"},
        {"case": "a", "value": 1.0},
        {"case": "missing", "left_out": "no such package"},
        {"case": "b", "value": 1.0},
    ]


def test_a_process_that_dies_leaves_its_rows_and_a_reason(check, monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import json, os, sys\n"
        "target = sys.argv[sys.argv.index('--rows') + 1]\n"
        "open(target, 'w').write(json.dumps({'case': 'a', 'value': 2}) + '\\n')\n"
        "print('an illegal access', file=sys.stderr, flush=True)\n"
        "os._exit(3)\n"
    )
    monkeypatch.setattr(check, "SCRIPT", script)
    rows = check._process(part(check, None), ["a", "b"], [], 60)
    assert rows == [{"case": "a", "value": 2}, {"case": "b", "error": "the process ended with 3: an illegal access"}]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_what_a_stopped_process_has_started_ends_with_it(check, monkeypatch, tmp_path):
    """As pytest would, which the part of the tests starts, and hold the card."""
    script, child = tmp_path / "waits.py", tmp_path / "child"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "waits = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(waits.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(check, "SCRIPT", script)
    spent = check._process

    def stopped(worker):
        while not (child.exists() and child.read_text()):
            time.sleep(0.05)
        kill(worker)

    kill = check._kill
    monkeypatch.setattr(check, "_kill", stopped)
    assert spent(part(check, None), ["a"], [], 1) == [{"case": "a", "error": "stopped after 1 s"}]
    until = time.monotonic() + 60
    while _lives(int(child.read_text())):
        assert time.monotonic() < until
        time.sleep(0.05)


def _lives(process: int) -> bool:
    """Not so of one that has ended and that nobody has asked for yet."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return (
            stat.read_text().rpartition(")")[2].split()[0] != "Z"
            if Path("/proc/self/stat").exists()
            else os.kill(process, 0) is None
        )
    except OSError:
        return False


def test_the_outcomes_of_the_tests_are_counted(monkeypatch):
    from gpu import suite
    from gpu.setting import Setting

    lines = []

    def run(line, **settings):
        lines.append(line)
        return subprocess.CompletedProcess(
            line, 1, "FAILED tests/x.py::y - oops\n1 failed, 70 passed, 3 skipped, 9 deselected in 9.0s\n", ""
        )

    monkeypatch.setattr(suite.subprocess, "run", run)
    (row,) = suite._measure(Setting(dry=False, quick=False), "pytest -m gpu")
    assert row == {
        "case": "pytest -m gpu",
        "passed": 70,
        "failed": 1,
        "skipped": 3,
        "error": "FAILED tests/x.py::y - oops",
    }
    assert "-q" not in lines[0], "with the project's own -q, pytest says no counts"


def test_time_that_is_spent_is_said(check, monkeypatch):
    from gpu.part import Part
    from gpu.setting import Setting

    begun = []

    def process(one, cases, flags, seconds):
        begun.append((list(cases), seconds))
        return [{"case": case} for case in cases]

    monkeypatch.setattr(check, "_process", process)
    spent = Part("x", "x", 0, lambda setting: ["a", "b"], lambda setting, case: [], fresh=True)
    assert all(row["error"].startswith("not begun") for row in check.measured(spent, Setting(True, False), []))
    assert begun == []
    check.measured(
        Part("x", "x", 50, lambda setting: ["a", "b"], lambda setting, case: [], fresh=True), Setting(True, False), []
    )
    assert [cases for cases, _ in begun] == [["a"], ["b"]]


def test_result_files_keep_earlier_parts_and_hold_the_bars(check, tmp_path):
    from gpu.report import Results

    def fresh():
        return Results(tmp_path, "NVIDIA H100 80GB HBM3", check.PARTS, dry=False)

    hybrid, long = "hybrid, 3 Mamba-2 to 1 attention", "batch 16 context 8192"
    cache = [
        {"case": long, "model": name, "cache_mb": size} for name, size in ((hybrid, 26.0), ("all attention", 100.0))
    ]
    fresh().add("decode", "python x", "here", 1.0, [{**cache[0], "over all attention": 1.2}, cache[1]])
    training = [
        {"case": f"eager {context}", "model": hybrid, "context": context, "mode": "eager", "over all attention": ratio}
        for context, ratio in ((1024, 0.9), (2048, 1.05), (4096, 1.3), (8192, 1.31))
    ]
    fresh().add("throughput", "python y", "here", 2.0, [*training, {"case": "mfu d20", "error": "RuntimeError: none"}])
    results = fresh()
    page = (tmp_path / "gpu-h100-80gb-hbm3.md").read_text()
    assert (tmp_path / "gpu-h100-80gb-hbm3.json").exists()
    for line in (
        "| decode, hybrid 3:1 against all attention, 8k context, batch 16 | >= 1.4x | 1.20x | **missed** |",
        "| cache, hybrid 3:1 against all attention, 8k context | <= 0.3x | 0.26x | met |",
        "| hybrid 3:1 against all attention, training tokens/s at T = 4096 | >= 1.1x | 1.30x | met |",
        "| hybrid 3:1 against all attention, training tokens/s at T = 16384 | >= 1.8x | not measured | - |",
        (
            "The hybrid trains faster than all attention from T = 2048 on (0.90x at 1024, 1.05x at 2048, 1.30x at 4096,"
            " 1.31x at 8192; eager)."
        ),
        "`python x`",
        "error: RuntimeError: none",
    ):
        assert line in page
    assert results.errors(["throughput", "decode"]) == ["throughput, mfu d20: RuntimeError: none"]
    assert results.errors(["decode"]) == []


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({}, "not measured"),
        ({1024: 0.5, 4096: 0.9}, "at no context up to 4096"),
        ({1024: 1.2, 2048: 0.9, 4096: 1.1}, "from T = 4096 on"),
    ],
)
def test_the_crossover(check, ratios, said):
    from gpu.models import HYBRID
    from gpu.throughput import crossover

    rows = [
        {"model": HYBRID, "mode": "eager", "context": context, "over all attention": ratio}
        for context, ratio in ratios.items()
    ]
    assert said in crossover(rows)


def test_the_bars_on_memory(check):
    from gpu.memory import MEMORY

    rows = [
        {"case": "a", "planned / allocated": 0.95, "with margin / reserved": 1.2},
        {"case": "b", "planned / allocated": 1.09, "with margin / reserved": 0.99},
        {"case": "c", "left_out": "does not fit"},
        {"case": "a", "kernels": "conv, mamba2", "planned / allocated with kernels": 1.3},
        {"case": "b", "kernels": "torch", "planned / allocated with kernels": 1.09},
    ]
    assert [bar.row(rows)[2:] for bar in MEMORY.bars] == [
        ["9.0%", "**missed**"],
        ["0.99x", "**missed**"],
        ["1.30x", "reported"],
    ]
    assert [bar.row(rows[:1])[2:] for bar in MEMORY.bars] == [["5.0%", "met"], ["1.20x", "met"], ["not measured", "-"]]
    assert [bar.row([])[3] for bar in MEMORY.bars] == ["-", "-", "-"]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_with_tiny_shapes(check, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--out", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert found.keys() == check.PARTS.keys()
    assert found["tests"]["rows"][0]["collected"] > 50
    assert not [row for one in found.values() for row in one["rows"] if "error" in row]
    assert [
        row["case"] for one in found.values() for row in one["rows"] if "left_out" in row and one is not found["tests"]
    ] == ["mamba_ssm Mamba-2"]
    assert "nothing failed" in done.stdout

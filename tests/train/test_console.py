"""The console: plain lines, and a progress bar that keeps its width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as RichConsole

from hybridlm.train.console import Console


def test_a_plain_line_names_bits_per_byte_time_left_and_skipped_steps(capsys):
    console = Console("auto", 100)
    metrics = {
        "train/loss": 2.0,
        "train/bpb": 1.5,
        "optim/lr": 1e-3,
        "perf/tokens_per_s": 10.0,
        "data/tokens": 100,
        "optim/skipped_steps": 0,
    }
    console.log_metrics(metrics, step=10)
    console.log_metrics(metrics | {"optim/skipped_steps": 3}, step=10)
    plain, skipped = capsys.readouterr().out.splitlines()
    assert plain == "step  10/100  loss 2.0000  1.5000 bits/byte  lr 1.00e-03  10 tokens/s  1:30 left"
    assert skipped == plain + "  3 skipped"


@pytest.mark.parametrize("width", [80, 110, 200])
@pytest.mark.parametrize("text", [True, False])
def test_the_bar_moves_at_every_step_and_keeps_its_width(width, text):
    screen = RichConsole(file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={})
    console = Console("auto", 20_000, screen)
    bars, moved = set(), []
    console.reach(0)
    for step in range(1, 12_001, 400):
        console.reach(step)
        if step > 1:
            quality = (
                {"val/bpb": 30 / step, "val/loss": 1.0}
                if text
                else {"val/accuracy": min(1.0, step / 10_000), "val/loss": 1.0}
            )
            console.log_metrics(
                {"train/loss": 40_000 / step, "train/bpb": 9 / step, "perf/tokens_per_s": 10.0 * step} | quality, step
            )
        lines = screen.render_lines(console._progress.get_renderable(), pad=False)
        (frame,) = ("".join(segment.text for segment in line) for line in lines)
        assert len(frame.rstrip()) <= width, frame
        assert f"{step}/20000" in frame
        assert step == 1 or ("loss" in frame and "val" in frame)
        bars.add(frame.index(f"{step:>5}/20000") - len("training "))
        moved.append(console._progress.tasks[0].completed)
    console.close()
    assert len(bars) == 1
    assert bars.pop() >= 12
    assert moved == list(range(1, 12_001, 400))
    assert (" tokens/s" in frame) == (width > 100)

"""The tracker itself: what is counted, what is not, and that workspaces of long sequences are extrapolated."""

from __future__ import annotations

import pytest
import torch

from hybridlm.memory import tracker as tracking
from hybridlm.memory.tracker import CUDA_GRAIN, tracked
from hybridlm.ops.delta import gated_delta
from hybridlm.ops.mimo import mimo_scan
from hybridlm.ops.selective_scan import selective_scan
from hybridlm.ops.ssd import scan


def test_views_and_freed_tensors():
    with tracked(gpu=False) as tracker:
        x = torch.empty(100, dtype=torch.float32)
        view = x[10:].view(-1, 2)
        assert tracker.held == 400
        y = x + x
        del x
        assert tracker.held == 800  # the view keeps it
        del view, y
        assert (tracker.held, tracker.peak) == (0, 800)


def test_a_gpus_allocator_rounds_up():
    with tracked(gpu=True) as tracker:
        x = torch.empty(3)
        assert tracker.held == CUDA_GRAIN
        del x


def test_workspace_of_a_custom_operator_is_counted_each_time():
    shape = (2, 64, 2, 16)
    with tracked(gpu=False) as tracker:
        x, b = torch.empty(shape), torch.empty(2, 64, 1, 8)
        decay = torch.empty(2, 64, 2)
        peaks = []
        for _ in range(2):
            tracker.restart()
            before = tracker.held
            y, state = scan(x, decay, decay, b, b, torch.empty(2), chunk=16)
            outputs = y.untyped_storage().nbytes() + state.untyped_storage().nbytes()
            peaks.append(tracker.restart() - before)
            del y, state
        assert peaks[0] == peaks[1] > 1.5 * outputs


def mamba1(batch: int, time: int) -> None:
    x, dt = (torch.empty(batch, time, 256, requires_grad=True) for _ in range(2))
    b, c = (torch.empty(batch, time, 16, requires_grad=True) for _ in range(2))
    selective_scan(x, dt, torch.empty(256, 16, requires_grad=True), b, c, torch.empty(256))[0].sum().backward()


def mimo(batch: int, time: int) -> None:
    heads, width, rank, states = 2, 16, 4, 32
    x = torch.empty(batch, time, heads, width, requires_grad=True)
    decay, scale, own = (torch.empty(batch, time, heads, requires_grad=True) for _ in range(3))
    b, c = (torch.empty(batch, time, rank, 1, states, requires_grad=True) for _ in range(2))
    biases = [torch.empty(heads, rank, states) for _ in range(2)]
    theta, mimo_x = torch.empty(batch, heads, 8, time), torch.empty(heads, rank, width)
    mimo_scan(x, decay, scale, own, b, c, *biases, theta, mimo_x, torch.empty(heads))[0].sum().backward()


def delta(batch: int, time: int) -> None:
    q, k, v = (torch.empty(batch, time, 4, 32, requires_grad=True) for _ in range(3))
    log_decay, beta = (torch.empty(batch, time, 4, requires_grad=True) for _ in range(2))
    gated_delta(q, k, v, log_decay, beta)[0].sum().backward()


@pytest.mark.parametrize("operator", [mamba1, mimo, delta])
@pytest.mark.parametrize(("batch", "time"), [(1, 16384), (8, 2048), (3, 5000)])
def test_workspace_of_a_long_sequence_is_extrapolated(operator, batch, time, monkeypatch):
    def peak() -> int:
        monkeypatch.setattr(tracking, "_WORKSPACES", {})
        with tracked(gpu=False) as tracker:
            operator(batch, time)
            return tracker.peak

    extrapolated = peak()
    monkeypatch.setattr(tracking, "_LOOPS", {})
    assert extrapolated == pytest.approx(peak(), rel=0.02)


def test_numbers_and_places_are_assumed():
    with tracked(gpu=False):
        assert float(torch.empty(3).sum()) == 1.0
        assert torch.empty(64, dtype=torch.bool).nonzero().shape == (2, 1)


@pytest.mark.parametrize("gpu", [False, True])
def test_tensors_stand_for_those_of_the_planned_device(gpu):
    with tracked(gpu):
        x = torch.empty(1)
        assert (x.is_cuda, x.is_cpu) == (gpu, not gpu)
    assert torch.empty(1).is_cpu

"""The ledger itself: what is counted, what is not, and that following a step leaves nothing behind."""

from __future__ import annotations

import torch

from hybridlm.memory.ledger import CUDA_GRAIN, counted
from hybridlm.ops import modes
from hybridlm.ops.ssd import scan


def test_views_and_what_is_freed():
    with counted(None) as ledger:
        x = torch.empty(100, dtype=torch.float32)
        view = x[10:].view(-1, 2)
        assert ledger.held == 400
        y = x + x
        del x
        assert ledger.held == 800  # the view keeps it
        del view, y
        assert (ledger.held, ledger.peak) == (0, 800)


def test_a_gpus_allocator_rounds_up():
    with counted((8, 0)) as ledger:
        x = torch.empty(3)
        assert ledger.held == CUDA_GRAIN
        del x


def test_workspace_of_an_operator_of_ours_is_seen_each_time():
    shape = (2, 64, 2, 16)
    with counted(None) as ledger:
        x, b = torch.empty(shape), torch.empty(2, 64, 1, 8)
        decay = torch.empty(2, 64, 2)
        peaks = []
        for _ in range(2):
            ledger.restart()
            before = ledger.held
            y, state = scan(x, decay, decay, b, b, torch.empty(2), chunk=16)
            outputs = y.untyped_storage().nbytes() + state.untyped_storage().nbytes()
            peaks.append(ledger.restart() - before)
            del y, state
        assert peaks[0] == peaks[1] > 1.5 * outputs


def test_numbers_and_places_are_assumed():
    with counted(None):
        assert float(torch.empty(3).sum()) == 1.0
        assert torch.empty(64, dtype=torch.bool).nonzero().shape == (2, 1)


def test_nothing_is_left_behind():
    with counted((9, 0)):
        assert modes.gpu(torch.empty(1)) == (9, 0)
        assert list(modes.rounds(range(10))) == [7, 8, 9]
    assert modes.gpu(torch.empty(1)) is None
    assert list(modes.rounds(range(10))) == list(range(10))

"""Synthetic tasks: what is asked, and that the same seed asks the same."""

from __future__ import annotations

import torch

from hybridlm.data.probes import parity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parity_asks_for_the_ones_so_far():
    probe = parity(50, 30, generator())
    assert probe.ids.shape == probe.targets.shape == (50, 30)
    assert set(probe.ids.unique().tolist()) == {0, 1}
    for bits, answers in zip(probe.ids.tolist(), probe.targets.tolist(), strict=True):
        assert answers == [sum(bits[: t + 1]) % 2 for t in range(30)]
    assert 0.45 < float(probe.ids.double().mean()) < 0.55


def test_a_seed_gives_the_same_texts_again():
    assert torch.equal(parity(4, 20, generator(3)).ids, parity(4, 20, generator(3)).ids)
    assert not torch.equal(parity(4, 20, generator(3)).ids, parity(4, 20, generator(4)).ids)

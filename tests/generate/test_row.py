"""Which choices rounding could have decided, and the choice of several rows."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import UserError
from hybridlm.generate.distribution import chosen, settled
from hybridlm.generate.row import Row, choose, refuse_impossible
from hybridlm.generate.sampling import Sampling

KINDS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.001),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(top_k=20),
    Sampling(min_p=0.05),
    Sampling(temperature=0.5, top_k=50, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1e-2])
def test_a_settled_choice_survives_the_noise(kind, noise):
    """Also where logits are equal, as those of tokens that were never trained are."""
    g = torch.Generator().manual_seed(0)
    open_ones = rows = 0
    for equal in (False, True):
        for _ in range(4):
            logits = torch.randn(64, 100, generator=g, dtype=torch.float64) * 3
            logits = (logits * 2).round() / 2 if equal else logits
            draws = torch.rand(64, generator=g).tolist()
            amplitude = noise * logits.abs().amax(-1)
            ids, sure = settled(logits, kind, draws, amplitude)
            assert torch.equal(ids, chosen(logits, kind, draws))
            for _ in range(10):
                signs = torch.randint(2, logits.shape, generator=g) * 2 - 1
                other = chosen(logits + signs * amplitude.unsqueeze(1), kind, draws)
                assert torch.equal(other[sure], ids[sure])
            if not equal:
                open_ones, rows = open_ones + int((~sure).sum()), rows + 64
    assert noise > 1e-5 or open_ones < 0.03 * rows


def test_a_tie_is_not_settled():
    logits = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 2.0]])
    rows = [Row(i, Sampling(temperature=0), None) for i in range(2)]
    assert [choice.settled for choice in choose(logits, rows, [[0], [0]], 1e-6)] == [False, True]
    assert [choice.settled for choice in choose(logits, rows, [[0], [0]])] == [True, True]


def test_a_banned_token_counts_for_nothing():
    rows = [Row(0, Sampling(temperature=0.5, logit_bias={1: -1e9, 2: -float("inf")}), None)]
    (choice,) = choose(torch.tensor([[1.0, 9.0, 9.0, -8.0]]), rows, [[0]], 1e-6)
    assert (choice.id, choice.settled) == (0, True)


@pytest.mark.parametrize("bias", [{4: 1.0}, {-1: 1.0}, dict.fromkeys(range(4), -float("inf"))])
def test_impossible_biases_are_refused(bias):
    with pytest.raises(UserError):
        refuse_impossible([Sampling(logit_bias=bias)], 4)

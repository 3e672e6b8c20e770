"""The probes of text models: what can be known and what cannot is told apart rightly."""

from __future__ import annotations

import numpy as np
import pytest

from hybridlm.data.synthetic.text_probes import TEXT_PROBES, copying, induction, ordinary_tokens
from hybridlm.data.tokenizer import byte_tokenizer

TOKENS = np.arange(100, 1100)


def test_induction_repeats_a_block_and_measures_its_second_copy():
    probe = induction(TOKENS, 50, 64, seed=0)
    assert probe.ids.shape == (50, 64)
    assert np.array_equal(probe.ids[:, :32], probe.ids[:, 32:])
    assert np.array_equal(probe.targets[:, 32:63], probe.ids[:, 33:])
    assert np.array_equal(probe.baseline[:, :31], probe.ids[:, 1:32])
    assert (probe.targets >= 0).sum() == (probe.baseline >= 0).sum() == 50 * 31
    assert (probe.ids >= 100).all()
    assert len(np.unique(probe.ids)) > 700


def test_copying_shows_lists_and_measures_the_last_copy():
    probe = copying(TOKENS, 20, 64, seed=0)
    for ids, targets, baseline in zip(*(part.tolist() for part in probe), strict=True):
        shots = [ids[first : first + 16] for first in range(0, 64, 16)]
        assert len(ids) == 64
        assert all(shot[:7] == shot[8:15] for shot in shots)
        assert len({(shot[7], shot[15]) for shot in shots}) == 1
        assert shots[0][7] != shots[0][15]
        assert not {shots[0][7], shots[0][15]} & {token for shot in shots for token in shot[:7]}
        asked = {place: target for place, target in enumerate(targets) if target >= 0}
        assert asked == {place: ids[place + 1] for place in range(55, 62)}
        assert {place: target for place, target in enumerate(baseline) if target >= 0} == {
            p: ids[p + 1] for p in range(48, 54)
        }


@pytest.mark.parametrize("name", TEXT_PROBES)
def test_a_probe_depends_only_on_its_seed(name):
    make = TEXT_PROBES[name]
    one, again, other = make(TOKENS, 4, 40, 1), make(TOKENS, 4, 40, 1), make(TOKENS, 4, 40, 2)
    assert np.array_equal(one.ids, again.ids)
    assert not np.array_equal(one.ids, other.ids)
    assert np.array_equal(one.ids, make(TOKENS, 9, 40, 1).ids[:4])


def test_ordinary_tokens_are_those_of_text():
    assert ordinary_tokens(byte_tokenizer(["<|user|>"]).token_bytes()).tolist() == list(range(256))

"""Probes answered by models that know how, and by one that does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.eval.probes import run_probes
from hybridlm.eval.scoring import Row, scored


class Copier:
    """Predicts what stood behind the longest match of the newest two tokens, an induction head by hand; else every id
    alike."""

    def __init__(self, vocab: int, sure: float) -> None:
        self.embedding = SimpleNamespace(weight=torch.zeros(1))
        self.vocab, self.sure = vocab, sure

    def __call__(self, ids, *, targets, each):
        logits = torch.zeros(*ids.shape, self.vocab)
        for row, tokens in enumerate(ids.tolist()):
            after: dict[tuple[int, ...], int] = {}
            for place, token in enumerate(tokens):
                for size in (1, 2):
                    key = tuple(tokens[max(0, place - size + 1) : place + 1])
                    if key in after:
                        logits[row, place] = 0
                        logits[row, place, after[key]] = self.sure
                for size in (1, 2):
                    if place >= size:
                        after[tuple(tokens[place - size : place])] = token
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return SimpleNamespace(losses=losses, likeliest=logits.argmax(-1) == targets)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def test_a_model_that_copies_solves_them(tokenizer):
    found = {probe.name: probe for probe in run_probes(Copier(257, 20.0), tokenizer, 256, 8)}
    assert found.keys() == {"induction", "copying", "passkey"}
    for name in ("induction", "copying"):
        assert [row["length"] for row in found[name].curve] == [32, 64, 128, 256]
        assert found[name].metrics["accuracy"] > 0.8, "but for pairs that come twice by chance"
        assert found[name].metrics["loss"] < found[name].metrics["baseline"] / 2
    assert found["passkey"].metrics["chosen"] > 0.8
    assert all(row["length"] >= 128 for row in found["passkey"].curve), "shorter ones have no room for the text"


def test_a_model_that_does_not_is_at_chance(tokenizer):
    found = {probe.name: probe for probe in run_probes(Copier(257, 0.0), tokenizer, 256, 8)}
    assert found["induction"].metrics["loss"] == pytest.approx(found["induction"].metrics["baseline"])
    assert found["copying"].metrics["accuracy"] < 0.05
    assert found["passkey"].metrics["written"] == 0.0


def test_equal_examples_for_every_model(tokenizer):
    first, second = (run_probes(Copier(257, 20.0), tokenizer, 64, batch) for batch in (3, 32))
    assert [probe.name for probe in first] == ["induction", "copying"]
    for one, other in zip(first, second, strict=True):
        assert one.metrics == pytest.approx(other.metrics)


def test_too_short_a_context(tokenizer):
    with pytest.raises(UserError, match="a context of 31 tokens is too short"):
        run_probes(Copier(257, 0.0), tokenizer, 31, 8)


def test_scores_come_back_in_order_and_equal_rows_agree():
    rows = [
        Row((1, 2, 3, 1, 2), 2),
        Row((5, 6), 1),
        Row((1, 2, 3, 1, 2), 2),
        Row((1, 2, 1, 2, 1, 2, 1), 4),
        Row((7,), 0),
    ]
    model = Copier(9, 5.0)
    together = scored(model, rows, 8)
    alone = [scored(model, [row], 1)[0] for row in rows]
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [nats for nats, _ in together] == pytest.approx([nats for nats, _ in alone])
    assert together[0] == together[2]
    assert together[4] == (0.0, True)

"""Probes answered by models whose answers are known beforehand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.eval.losses import Continuation, loglikelihoods
from hybridlm.eval.probes import run_probes, text_probe_metrics


class Copier:
    """Predicts what followed the most recent match of the last one or two tokens, an induction head by hand; otherwise
    all ids are equally likely."""

    def __init__(self, vocab: int, sure: float, matched: tuple[int, ...] = (1, 2)) -> None:
        self.embedding = SimpleNamespace(weight=torch.zeros(1))
        self.vocab, self.sure, self.matched = vocab, sure, matched

    def __call__(self, ids, *, targets, each):
        logits = torch.zeros(*ids.shape, self.vocab)
        for row, tokens in enumerate(ids.tolist()):
            after: dict[tuple[int, ...], int] = {}
            for place, token in enumerate(tokens):
                for size in self.matched:
                    if place >= size:
                        after[tuple(tokens[place - size : place])] = token
                for size in self.matched:
                    key = tuple(tokens[max(0, place - size + 1) : place + 1])
                    if key in after:
                        logits[row, place] = 0
                        logits[row, place, after[key]] = self.sure
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return SimpleNamespace(losses=losses, likeliest=logits.argmax(-1) == targets)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def test_a_model_that_copies_solves_them(tokenizer):
    found = run_probes(Copier(257, 20.0), tokenizer, 256, 8)
    assert found.keys() == {"induction", "copying"}
    for name in ("induction", "copying"):
        assert [row["length"] for row in found[name]] == [32, 64, 128, 256]
        assert found[name][-1]["accuracy"] > 0.8, "except for pairs that occur twice by chance"
        assert found[name][-1]["loss"] < found[name][-1]["baseline"] / 2


def test_a_model_that_does_not_is_at_chance(tokenizer):
    found = run_probes(Copier(257, 0.0), tokenizer, 256, 8)
    assert found["induction"][-1]["loss"] == pytest.approx(found["induction"][-1]["baseline"])
    assert found["copying"][-1]["accuracy"] < 0.05


def test_equal_examples_for_every_model(tokenizer):
    first, second = (run_probes(Copier(257, 20.0), tokenizer, 64, batch) for batch in (3, 32))
    assert list(first) == list(second) == ["induction", "copying"]
    for name in first:
        assert first[name][-1] == pytest.approx(second[name][-1])


def test_too_short_a_context(tokenizer):
    with pytest.raises(UserError, match="31"):
        run_probes(Copier(257, 0.0), tokenizer, 31, 8)


def test_metrics_of_training_are_far_below_the_baseline_for_a_model_that_remembers():
    tokenizer = byte_tokenizer(["<|user|>"])
    vocab = tokenizer.vocab_size
    found = text_probe_metrics(Copier(vocab, 30.0, (1,)), tokenizer, examples=12, length=48)
    assert set(found) == {
        f"{name}/{what}" for name in ("induction", "copying") for what in ("loss", "baseline", "accuracy")
    }
    # It goes by the last occurrence of a token: among so few bytes some occur twice, and after a list's separator it
    # expects the list before, so of the five tokens of a copy it misses the first.
    assert found["induction/accuracy"] > 0.85
    assert 0.65 < found["copying/accuracy"] <= 0.8
    for name in ("induction", "copying"):
        assert found[f"{name}/baseline"] > math.log(vocab) - 1e-6, "nothing predicts it"
    assert found["induction/loss"] < found["induction/baseline"] - 2


def test_a_model_that_knows_nothing_is_at_the_baseline_and_a_seed_repeats(tokenizer):
    found = text_probe_metrics(Copier(257, 0.0), tokenizer, examples=4, length=40)
    for name in ("induction", "copying"):
        assert found[f"{name}/loss"] == pytest.approx(math.log(257))
        assert found[f"{name}/baseline"] == pytest.approx(math.log(257))
        assert found[f"{name}/accuracy"] < 0.1
    assert text_probe_metrics(Copier(257, 0.0), tokenizer, examples=4, length=40) == found
    assert text_probe_metrics(Copier(257, 9.0), tokenizer, examples=4, length=40, seed=1) != text_probe_metrics(
        Copier(257, 9.0), tokenizer, examples=4, length=40
    )


def test_scores_are_in_order_and_equal_requests_agree():
    requests = [
        Continuation((1, 2, 3, 1, 2), 2),
        Continuation((5, 6), 1),
        Continuation((1, 2, 3, 1, 2), 2),
        Continuation((1, 2, 1, 2, 1, 2, 1), 4),
        Continuation((7,), 0),
    ]
    model = Copier(9, 5.0)
    together = loglikelihoods(model, requests, 8)
    alone = [loglikelihoods(model, [request], 1)[0] for request in requests]
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [nats for nats, _ in together] == pytest.approx([nats for nats, _ in alone])
    assert together[0] == together[2]
    assert together[4] == (0.0, True)

"""The measured probes, of models whose answers are known beforehand."""

from __future__ import annotations

import math
import types

import pytest
import torch

from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.eval.text_probes import text_probe_metrics

TOKENIZER = byte_tokenizer(["<|user|>"])


class Remembers(torch.nn.Module):
    """Foretells what followed the last coming of the token, surely; a token that is new gets even odds."""

    def __init__(self):
        super().__init__()
        self.embedding, self.vocab_size = torch.nn.Embedding(TOKENIZER.vocab_size, 1), TOKENIZER.vocab_size

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, self.vocab_size)
        for row, tokens in enumerate(ids.tolist()):
            following = {}
            for place, token in enumerate(tokens):
                if token in following:
                    logits[row, place, following[token]] = 30.0
                if place + 1 < len(tokens):
                    following[token] = tokens[place + 1]
        return types.SimpleNamespace(logits=logits)


def test_a_model_that_remembers_is_far_below_the_baseline():
    found = text_probe_metrics(Remembers(), TOKENIZER, examples=12, length=48)
    assert set(found) == {
        f"{name}/{what}" for name in ("induction", "copying") for what in ("loss", "baseline", "accuracy")
    }
    # It goes by the last coming of a token: in so few bytes some come twice, and behind a list's separator it expects
    # the list before, so of the five tokens of a copy it misses the first.
    assert found["induction/accuracy"] > 0.85
    assert 0.65 < found["copying/accuracy"] <= 0.8
    for name in ("induction", "copying"):
        assert found[f"{name}/baseline"] > math.log(TOKENIZER.vocab_size) - 1e-6, "nothing foretells it"
    assert found["induction/loss"] < found["induction/baseline"] - 2


def test_a_model_that_knows_nothing_is_at_the_baseline_and_a_seed_repeats():
    class Nothing(Remembers):
        def forward(self, ids):
            return types.SimpleNamespace(logits=torch.zeros(*ids.shape, self.vocab_size))

    found = text_probe_metrics(Nothing(), TOKENIZER, examples=4, length=40)
    for name in ("induction", "copying"):
        assert found[f"{name}/loss"] == pytest.approx(math.log(TOKENIZER.vocab_size))
        assert found[f"{name}/baseline"] == pytest.approx(math.log(TOKENIZER.vocab_size))
        assert found[f"{name}/accuracy"] < 0.1
    assert text_probe_metrics(Nothing(), TOKENIZER, examples=4, length=40) == found

"""Each sampling option against a definition of its own: loops over numpy, written without looking at the tensors'
way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hybridlm.errors import UserError
from hybridlm.generate.distribution import adjusted, chosen, draw, probabilities, token_logprobs
from hybridlm.generate.sampling import Sampling

V = 40


def some_logits(rows: int = 5, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def defined(row: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What is drawn from, by the words of the options."""
    row = row / sampling.temperature
    kept = set(range(len(row)))
    likeliest = sorted(kept, key=lambda i: -row[i])
    if sampling.top_k is not None:
        kept = set(likeliest[: sampling.top_k])
    left = softmax(np.array([row[i] if i in kept else -np.inf for i in range(len(row))]))
    if sampling.top_p < 1:
        kept, total = set(), 0.0
        for i in likeliest:
            if total >= sampling.top_p:
                break
            kept.add(i)
            total += left[i]
        left = np.array([left[i] if i in kept else 0.0 for i in range(len(row))])
    if sampling.min_p:
        left = np.array([p if p >= sampling.min_p * left.max() else 0.0 for p in left])
    return left / left.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 400},
        {"top_p": 0.05},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"min_p": 0.02},
        {"min_p": 1.0},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1.4, "top_p": 0.6, "min_p": 0.3},
    ],
)
def test_the_distribution_is_the_defined_one(options):
    sampling, logits = Sampling(**options), some_logits()
    got = probabilities(logits, sampling).numpy()
    for mine, row in zip(got, logits.numpy(), strict=True):
        want = defined(row, sampling)
        assert ((mine > 0) == (want > 0)).all()
        np.testing.assert_allclose(mine, want, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 0.7},
        {"frequency_penalty": 0.4},
        {"logit_bias": {3: 2.5, 7: -1.0, 9: -math.inf}},
        {
            "repetition_penalty": 1.2,
            "presence_penalty": -0.3,
            "frequency_penalty": 0.1,
            "logit_bias": {0: 1.0, 5: -4.0},
        },
    ],
)
def test_bias_and_penalties_are_the_defined_ones(options):
    sampling, logits = Sampling(**options), some_logits(3)
    prompts, generated = [[1, 1, 5], [0], []], [[5, 5, 5, 9], [], [39, 39]]
    rows = [given + new for given, new in zip(prompts, generated, strict=True)]
    before = logits.clone()
    got = adjusted(logits, sampling, rows, [len(new) for new in generated]).numpy()
    assert torch.equal(logits, before)
    for row, given, new, mine in zip(logits.numpy(), prompts, generated, got, strict=True):
        want = row.copy()
        for i in range(V):
            want[i] += sampling.logit_bias.get(i, 0.0)
            if i in given or i in new:
                want[i] = (
                    want[i] / sampling.repetition_penalty if want[i] > 0 else want[i] * sampling.repetition_penalty
                )
            if i in new:
                want[i] -= sampling.presence_penalty
                for _ in range(new.count(i)):
                    want[i] -= sampling.frequency_penalty
        np.testing.assert_allclose(mine, want, atol=1e-12)


def test_temperature_zero_is_greedy():
    logits = some_logits()
    assert chosen(logits, Sampling(temperature=0), [0.99] * 5).tolist() == logits.argmax(-1).tolist()


def test_a_draw_takes_the_token_whose_share_it_falls_into():
    """Also at both ends, where tokens without probability must not be taken."""
    sampling, logits = Sampling(top_k=6), some_logits(1)
    shares = defined(logits[0].numpy(), sampling)
    for number in (0.0, 1e-12, 0.2, 0.5, 0.77, 0.9999, 1 - 2**-48):
        total = 0.0
        for want, share in enumerate(shares):
            total += share
            if total > number and share > 0:
                break
        assert chosen(logits, sampling, [number]).tolist() == [want], number


def test_draws_hang_on_seed_and_place_alone_and_are_even():
    draws = np.array([draw(seed, place) for seed in range(20) for place in range(1000)])
    assert draw(3, 7) == draw(3, 7)
    assert len(set(draws)) == len(draws)
    assert 0 <= draws.min() < draws.max() < 1
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    expected = len(draws) / 50
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 86  # chi-squared of 49 degrees of freedom: one in a thousand is larger


def test_samples_follow_the_distribution():
    logits, n = some_logits(1), 20_000
    tokens = chosen(logits.expand(n, -1), Sampling(), [draw(0, place) for place in range(n)])
    frequencies = torch.bincount(tokens, minlength=V) / n
    torch.testing.assert_close(frequencies, logits.softmax(-1)[0].float(), atol=0.015, rtol=0)


def test_logprobs_are_the_models_own():
    logits = some_logits(2)
    got = token_logprobs(logits, torch.tensor([4, 8]), 3)
    for one, token, row in zip(got, (4, 8), logits.numpy(), strict=True):
        want = np.log(softmax(row))
        assert one.id == token
        assert one.logprob == pytest.approx(want[token], abs=1e-12)
        assert [i for i, _ in one.top] == np.argsort(-want)[:3].tolist()
        assert [value for _, value in one.top] == pytest.approx(np.sort(want)[::-1][:3].tolist(), abs=1e-12)
    assert [one.top for one in token_logprobs(logits, torch.tensor([4, 8]), 0)] == [(), ()]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty = nan"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"stop": ("a", "")}, "stop = "),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"logprobs": -1}, "logprobs = -1"),
    ],
)
def test_values_outside_their_range_are_refused_in_a_line(options, says):
    with pytest.raises(UserError, match=f"^{next(iter(options))} = ") as caught:
        Sampling(**options)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(says)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-38, 1e-6, 1e6, 1e300])
def test_no_temperature_overflows(temperature, dtype):
    """The coldest take one of the likeliest, the hottest any alike; with the largest bias and penalties too."""
    logits = torch.tensor([[3.0, 9.0, -4.0, 9.0, 8.9]], dtype=dtype)
    extremes = Sampling(
        temperature, logit_bias={1: 1e9, 3: 1e9, 2: -math.inf}, repetition_penalty=1e-9, frequency_penalty=-1e9
    )
    for sampling in (Sampling(temperature), extremes):
        found = probabilities(adjusted(logits, sampling, [[0, 1, 3, 1, 3]], [2]), sampling)
        assert torch.isfinite(found).all()
        assert float(found.sum()) == pytest.approx(1.0)
        if temperature < 1e-3:
            assert found.tolist() == [[0.0, 0.5, 0.0, 0.5, 0.0]]
            assert chosen(logits, sampling, [0.999]).tolist() == [3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("repetition_penalty", value) for value in (1e-45, 1e10, math.nan, math.inf, 0.0)],
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (1e39, -1e39, math.nan)],
        *[("logit_bias", {1: value}) for value in (1e39, -1e39, math.nan, math.inf)],
    ],
)
def test_numbers_that_would_overflow_are_refused(field, value):
    with pytest.raises(UserError, match=f"{field} = "):
        Sampling(**{field: value})

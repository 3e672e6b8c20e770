"""Each sampling option against its definition."""

import torch

from hybridlm.generate.sampling import Sampler

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])


def test_temperature_zero_is_greedy():
    assert Sampler(temperature=0)(LOGITS).tolist() == [0]


def test_temperature_divides_the_logits():
    torch.testing.assert_close(Sampler(temperature=0.5).probabilities(LOGITS), (LOGITS / 0.5).softmax(-1))


def test_top_k_keeps_the_k_likeliest():
    kept = Sampler(top_k=2).probabilities(LOGITS)[0]
    assert (kept > 0).tolist() == [True, False, False, False, True]
    torch.testing.assert_close(kept[kept > 0], LOGITS[0, [0, 4]].softmax(-1))


def test_top_p_keeps_the_smallest_set_that_holds_p():
    probabilities = LOGITS.softmax(-1)[0]
    order = probabilities.argsort(descending=True)
    for p in (0.1, 0.45, 0.7, 0.9, 0.99):
        kept = (Sampler(top_p=p).probabilities(LOGITS)[0] > 0).nonzero().flatten().tolist()
        wanted = order[: int((probabilities[order].cumsum(0) < p).sum()) + 1].tolist()
        assert sorted(kept) == sorted(wanted), p
        assert float(probabilities[kept].sum()) >= p
    torch.testing.assert_close(Sampler(top_p=0.7).probabilities(LOGITS).sum(), torch.tensor(1.0))


def test_a_seed_gives_the_same_tokens_and_another_one_others():
    def draw(seed):
        sampler = Sampler(seed=seed)
        return [int(sampler(torch.zeros(1, 50))) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_samples_follow_the_distribution():
    sampler = Sampler(seed=0)
    draws = sampler(LOGITS.expand(20_000, -1))
    frequencies = torch.bincount(draws, minlength=5) / 20_000
    torch.testing.assert_close(frequencies, LOGITS.softmax(-1)[0], atol=0.015, rtol=0)

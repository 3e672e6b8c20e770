"""What is said about a comparison: the verdict, cautions and notes."""

from __future__ import annotations

import json

import pytest
from run_folders import make_run

from hybridlm.report.comparison import best_of, compare
from hybridlm.report.runs import read_folders
from hybridlm.report.verdict import cautions, verdict


def verdict_of(folder, figures):
    """figures: by pattern, the bits per byte of each seed."""
    for pattern, values in figures.items():
        for seed, bpb in enumerate(values):
            make_run(folder / f"{pattern}-{seed}", pattern=pattern, seed=seed, bpb=bpb)
    (one,) = compare(read_folders([folder])[0])
    return verdict(one)


def contains(sentence, *parts):
    return all(part in sentence for part in parts)


def test_no_run_has_finished(tmp_path):
    _, status = verdict_of(tmp_path, {"T": [None]})
    assert "1 unfinished" in status


def test_one_seed_each_is_inconclusive(tmp_path):
    best, following, seeds = verdict_of(tmp_path, {"T": [2.0], "M": [1.9]})
    assert contains(best, "M is best", "1.9000", "one seed")
    assert contains(following, "T", "0.1000")
    assert contains(seeds, "inconclusive", "seed=0,1,2")


def test_a_difference_outside_the_spread(tmp_path):
    best, following = verdict_of(tmp_path, {"T": [2.0, 2.02], "M": [1.9, 1.92]})
    assert contains(best, "M is best", "1.9100", "2 seeds", "0.014")
    assert contains(following, "T", "0.1000", "outside", "0.014")


def test_within_the_spread_the_cheapest_is_named(tmp_path):
    _, following, equal, worse = verdict_of(tmp_path, {"T": [2.0, 2.2], "M": [1.95, 2.15], "TM": [3.0, 3.1]})
    assert contains(following, "T", "0.0500", "within", "0.14")
    assert contains(equal, " T.", "smallest decode cache M")
    assert contains(worse, "TM", "1.0000", "0.11")


def test_a_single_configuration(tmp_path):
    (sentence,) = verdict_of(tmp_path, {"T": [2.0]})
    assert contains(sentence, "T: 2.0000", "one seed")


def a_run(folder, epoch=1.0, **others):
    """epoch: passes over the text at its end; None: not logged."""
    made = make_run(folder, **others)
    if epoch is not None:
        rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
        rows[-1]["data/epoch"] = epoch
        (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def said(folder, best=()):
    (one,) = compare(read_folders([folder])[0])
    return cautions(best_of(one, best))


def rates(folder, tried, **others):
    """tried: by pattern, the bits per byte by learning rate."""
    for pattern, found in tried.items():
        for lr, bpb in found.items():
            settings = {"optim.name": "adamw", "optim.lr": lr}
            lines = [f"model.pattern={pattern}", f"optim.lr={lr}"]
            a_run(folder / f"{pattern}-{lr}", pattern=pattern, bpb=bpb, settings=settings, overrides=lines, **others)


@pytest.mark.parametrize(
    ("epochs", "sentence"),
    [
        ((0.12, 0.12), "These runs saw 12% of the training text"),
        ((0.004, 0.5), "These runs saw 0.4% to 50% of the training text"),
        ((0.012, 2.5), "1 of these 2 runs saw 1.2% of the training text"),
        ((0.97, 3.0), None),
        ((None, None), None),
    ],
)
def test_little_of_the_text_was_seen(tmp_path, epochs, sentence):
    for i, epoch in enumerate(epochs):
        a_run(tmp_path / str(i), epoch, seed=i)
    assert [one for one in said(tmp_path) if one.startswith(sentence or "")] == said(tmp_path)
    assert len(said(tmp_path)) == (sentence is not None)


def test_a_single_run_is_advised_to_train_longer(tmp_path):
    a_run(tmp_path / "a", 0.0076)
    (sentence,) = said(tmp_path)
    assert contains(sentence, "This run saw 0.76%", "trainer.max_steps")


def test_a_generated_task_has_no_end(tmp_path):
    a_run(tmp_path / "a", 0.1, settings={"data.source": "synthetic"})
    assert said(tmp_path) == []


def test_the_same_rate_for_all(tmp_path):
    rates(tmp_path, {"T": {0.02: 2.0}, "M": {0.02: 1.9}})
    (sentence,) = said(tmp_path)
    assert contains(sentence, "(optim.lr=0.02)", "optim.lr=0.01,0.02,0.04", "--best-of optim.lr")


def test_a_single_rate_for_each(tmp_path):
    rates(tmp_path, {"T": {0.02: 2.0}, "M": {0.01: 1.9}})
    (sentence,) = said(tmp_path)
    assert contains(sentence, "one learning rate", "--best-of optim.lr")


def test_the_rate_of_muon_is_named_if_it_is_the_optimizer(tmp_path):
    for pattern in "TM":
        a_run(tmp_path / pattern, pattern=pattern)
    (sentence,) = said(tmp_path)
    assert "optim.muon.lr=0.02" in sentence


def test_several_rates_for_each_model_raise_no_caution(tmp_path):
    rates(tmp_path, {"T": {0.01: 2.1, 0.02: 2.0, 0.04: 2.2}, "M": {0.01: 2.0, 0.02: 1.9, 0.04: 2.2}})
    assert said(tmp_path) == said(tmp_path, ["optim.lr"]) == []


def test_one_model_at_several_rates_raises_no_caution(tmp_path):
    rates(tmp_path, {"T": {0.01: 2.1, 0.02: 2.0}})
    assert said(tmp_path) == []


def test_untuned_models_and_rates_at_the_edge_are_named(tmp_path):
    rates(tmp_path, {"T": {0.01: 2.1, 0.02: 2.0, 0.04: 1.9}, "M": {0.01: 2.0}, "TM": {0.01: 2.0, 0.02: 1.9, 0.04: 2.1}})
    untuned, edge = said(tmp_path, ["optim.lr"])
    assert untuned.endswith(" M, lr=0.01.")
    assert contains(edge, "T, lr=0.04 (largest)", "optim.lr")
    assert "TM" not in edge


def test_configurations_trained_on_different_numbers_of_tokens(tmp_path):
    for i, tokens in enumerate((10_000, 10_050, 20_480)):
        lr = 0.01 * (i + 1)  # of one model
        a_run(tmp_path / str(i), settings={"optim.lr": lr}, overrides=[f"optim.lr={lr}"], facts={"tokens": tokens})
    (sentence,) = said(tmp_path)
    assert "10.0 to 20.5 thousand" in sentence

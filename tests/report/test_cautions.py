"""What keeps a ranking from being a finding."""

from __future__ import annotations

import json

import pytest
from run_folders import make_run

from hybridlm.report.cautions import cautions
from hybridlm.report.comparison import best_of, compare
from hybridlm.report.reading import read_folders

RATE = "a point may lose by its rate alone"


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
        ((0.12, 0.12), "These runs saw 12% of the training text: "),
        ((0.004, 0.5), "These runs saw 0.4% to 50% of the training text: "),
        ((0.012, 2.5), "1 of these 2 runs saw 1.2% of the training text: "),
        ((0.97, 3.0), None),
        ((None, None), None),
    ],
)
def test_how_much_of_the_text_was_seen(tmp_path, epochs, sentence):
    for i, epoch in enumerate(epochs):
        a_run(tmp_path / str(i), epoch, seed=i)
    assert [one for one in said(tmp_path) if one.startswith(sentence or "")] == said(tmp_path)
    assert len(said(tmp_path)) == (sentence is not None)


def test_a_run_alone_is_told_to_train_on(tmp_path):
    a_run(tmp_path / "a", 0.0076)
    (sentence,) = said(tmp_path)
    assert sentence.startswith("This run saw 0.76% of the training text: longer training (trainer.max_steps)")


def test_of_a_generated_task_there_is_always_more(tmp_path):
    a_run(tmp_path / "a", 0.1, settings={"data.source": "synthetic"})
    assert said(tmp_path) == []


def test_one_rate_for_all(tmp_path):
    rates(tmp_path, {"T": {0.02: 2.0}, "M": {0.02: 1.9}})
    (sentence,) = said(tmp_path)
    assert sentence == (
        f"One learning rate (optim.lr=0.02) served all points: {RATE}. Try several for each (optim.lr=0.01,0.02,0.04), "
        "and add --best-of optim.lr."
    )


def test_one_rate_for_each(tmp_path):
    rates(tmp_path, {"T": {0.02: 2.0}, "M": {0.01: 1.9}})
    (sentence,) = said(tmp_path)
    assert sentence.startswith(f"Each point had one learning rate: {RATE}")


def test_the_rate_of_muon_is_named_where_it_trains(tmp_path):
    for pattern in "TM":
        a_run(tmp_path / pattern, pattern=pattern)
    assert [one.startswith("One learning rate (optim.muon.lr=0.02)") for one in said(tmp_path)] == [True]


def test_several_rates_for_each_model_are_no_reason(tmp_path):
    rates(tmp_path, {"T": {0.01: 2.1, 0.02: 2.0, 0.04: 2.2}, "M": {0.01: 2.0, 0.02: 1.9, 0.04: 2.2}})
    assert said(tmp_path) == said(tmp_path, ["optim.lr"]) == []


def test_one_model_at_several_rates_is_no_reason(tmp_path):
    rates(tmp_path, {"T": {0.01: 2.1, 0.02: 2.0}})
    assert said(tmp_path) == []


def test_a_model_that_had_fewer_tries_and_a_rate_at_the_end_are_named(tmp_path):
    rates(tmp_path, {"T": {0.01: 2.1, 0.02: 2.0, 0.04: 1.9}, "M": {0.01: 2.0}, "TM": {0.01: 2.0, 0.02: 1.9, 0.04: 2.1}})
    assert said(tmp_path, ["optim.lr"]) == [
        "One learning rate only: M, lr=0.01.",
        "The best optim.lr is at an end of those tried, and a better one may lie beyond: T, lr=0.04 (largest).",
    ]


def test_points_of_different_length(tmp_path):
    for i, tokens in enumerate((10_000, 10_050, 20_480)):
        lr = 0.01 * (i + 1)  # of one model
        a_run(tmp_path / str(i), settings={"optim.lr": lr}, overrides=[f"optim.lr={lr}"], facts={"tokens": tokens})
    (sentence,) = said(tmp_path)
    assert sentence.startswith("The points were trained on different numbers of tokens (10.0 to 20.5 thousand)")

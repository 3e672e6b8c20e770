"""Which runs are compared, as which points, and what is said of them."""

from __future__ import annotations

import math

import pytest
from run_folders import make_job, make_run

from hybridlm.report.comparison import best_of, compare
from hybridlm.report.reading import read_folders
from hybridlm.report.verdict import verdict


def compared(folder, varied=()):
    return compare(read_folders([folder])[0], varied)


def test_seeds_of_one_configuration_are_a_point(tmp_path):
    for i, (pattern, seed, bpb) in enumerate(
        [("T", 0, 2.0), ("T", 1, 2.2), ("M", 0, 1.5), ("M", 1, 1.7), ("M", 2, 1.6)]
    ):
        make_run(tmp_path / str(i), pattern=pattern, seed=seed, bpb=bpb)
    (one,) = compared(tmp_path)
    assert one.columns == ("model.pattern",)
    assert [(point.name, len(point.runs)) for point in one.points] == [("M", 3), ("T", 2)]
    assert one.points[0].spread(one.quality).mean == pytest.approx(1.6)


def test_where_a_run_writes_and_how_it_logs_tells_no_points_apart(tmp_path):
    for i in range(2):
        make_run(
            tmp_path / str(i),
            seed=i,
            settings={"data.out": f"/data/{i}", "logger.project": f"p{i}", "trainer.headless": bool(i)},
        )
    (one,) = compared(tmp_path)
    assert [len(point.runs) for point in one.points] == [2]
    assert one.columns == ()


def test_columns_are_what_was_varied_and_fields_that_tell_the_rest_apart(tmp_path):
    lines = ['++model.pattern="T"', "++optim.lr=0.01"]
    make_run(tmp_path / "0", pattern="T", settings={"optim.lr": 0.01}, overrides=lines)
    make_run(
        tmp_path / "1",
        pattern="T",
        settings={"optim.lr": 0.02, "model.mlp.expand": 3.0},
        overrides=[lines[0], "++optim.lr=0.02"],
    )
    make_run(
        tmp_path / "2",
        pattern="T",
        settings={"optim.lr": 0.02, "model.d_model": 96},
        overrides=[lines[0], "++optim.lr=0.02"],
    )
    (one,) = compared(tmp_path)
    assert one.columns == ("optim.lr", "model.d_model")
    assert sorted(point.name for point in one.points) == [
        "lr=0.01, d_model=64",
        "lr=0.02, d_model=64",
        "lr=0.02, d_model=96",
    ]


def test_a_group_of_loggers_is_no_column(tmp_path):
    make_run(tmp_path / "0", seed=0, settings={"logger.name": "wandb"}, overrides=["logger=wandb"])
    make_run(tmp_path / "1", seed=1, overrides=["logger=files"])
    (one,) = compared(tmp_path)
    assert (one.columns, [len(point.runs) for point in one.points]) == ((), [2])


def test_devices_are_told_apart(tmp_path):
    for i, device in enumerate(("CPU, 1 threads", "NVIDIA X")):
        make_run(tmp_path / str(i), facts={"device": device})
    (one,) = compared(tmp_path)
    assert one.columns == ("device",)
    assert len(one.points) == 2
    assert any("different devices" in note for note in one.notes)


def test_a_sweep_resumed_with_other_threads_keeps_its_points(tmp_path):
    for i in range(2):
        make_run(tmp_path / str(i), seed=i, facts={"device": f"CPU, {1 + i} threads"})
    (one,) = compared(tmp_path)
    assert [len(point.runs) for point in one.points] == [2]
    assert any("numbers of threads" in note for note in one.notes), "the speeds do not compare"


def test_widths_that_matching_set_are_no_columns(tmp_path):
    """They follow from the pattern, which the user varied."""
    for pattern, width in (("T", 512), ("M", 336), ("MT", 432)):
        matched = (
            f"model.mlp.d_ff 512 -> {width}: 1,440,000 parameters, pattern T 1,444,224, -0.29%"
            if width < 512
            else "nothing to change"
        )
        settings = {"sweep.match": "params", "sweep.matched": matched, "model.mlp.d_ff": width if width < 512 else None}
        make_run(
            tmp_path / pattern,
            pattern=pattern,
            settings=settings,
            overrides=[f"model.pattern={pattern}", f"model.mlp.d_ff={width}"],
        )
    (one,) = compared(tmp_path)
    assert one.columns == ("model.pattern",)
    assert len(one.points) == 3


def test_what_only_a_failed_run_varies_is_a_column_and_in_no_name(tmp_path):
    for pattern in "TM":
        make_run(tmp_path / pattern, pattern=pattern)
    make_run(tmp_path / "lost", bpb=None, settings={"optim.lr": 1.0}, overrides=["model.pattern=TM", "optim.lr=1.0"])
    (one,) = compared(tmp_path)
    assert one.columns == ("model.pattern", "optim.lr")
    assert sorted(point.name for point in one.points) == ["M", "T"]
    assert one.name_of(one.points[0].settings) == one.points[0].name


def test_another_validation_text_is_another_comparison(tmp_path):
    make_run(tmp_path / "0", pattern="T", bpb=1.0)
    make_run(tmp_path / "1", pattern="M", bpb=2.0)
    make_run(tmp_path / "2", pattern="TM", bpb=0.5, facts={"val_bytes": 1000}, settings={"data.val_fraction": 0.2})
    make_run(tmp_path / "3", pattern="MT", bpb=None, settings={"data.val_fraction": 0.2})
    first, second = compared(tmp_path)
    assert [point.name for point in first.points] == ["T", "M"]
    assert [point.name for point in second.points] == ["TM"]
    assert (first.lost, [run.name for run in second.lost]) == ((), ["3"])


def test_the_same_text_under_another_tokenizer_compares_and_is_said(tmp_path):
    make_run(tmp_path / "0", bpb=1.0)
    make_run(tmp_path / "1", bpb=2.0, settings={"data.tokenizer.vocab_size": 1024})
    (one,) = compared(tmp_path)
    assert one.columns == ("data.tokenizer.vocab_size",)
    assert any("different tokenizers" in note for note in one.notes)


def test_how_long_and_on_how_many_examples_a_task_was_trained_is_not_another_task(tmp_path):
    task = {"val/bpb": None, "gzip_bpb": None, "xz_bpb": None, "val_bytes": None, "val/accuracy": 0.5}
    same = {
        "synthetic.examples": 10,
        "synthetic.min_length": 16,
        "synthetic.eval_lengths": [512],
        "tokenizer.vocab_size": 1024,
    }
    other = {"synthetic.n_pairs": 2, "synthetic.seed": 1, "seq_len": 128}
    for i, (key, value) in enumerate([("workers", 0), *same.items(), *other.items()]):
        make_run(tmp_path / str(i), facts=task, settings={"data.source": "synthetic", f"data.{key}": value})
    first, *others = compared(tmp_path)
    assert set(first.columns) == {f"data.{key}" for key in same}
    assert not any("tokenizers" in note for note in first.notes), "a task has its own tokens"
    assert (len(first.points), [len(one.points) for one in others]) == (5, [1, 1, 1])


def test_without_bits_per_byte_the_data_have_to_be_the_same(tmp_path):
    task = {"val/bpb": None, "gzip_bpb": None, "xz_bpb": None}
    make_run(tmp_path / "0", pattern="T", facts={**task, "val/accuracy": 0.5})
    make_run(tmp_path / "1", pattern="M", facts={**task, "val/accuracy": 0.9})
    make_run(tmp_path / "2", facts={**task, "val/accuracy": 1.0}, settings={"data.tokenizer.vocab_size": 1024})
    first, second = compared(tmp_path)
    assert first.quality.key == "val/accuracy"
    assert [point.name for point in first.points] == ["M", "T"], "more is better"
    assert len(second.points) == 1


def test_text_in_windows_of_other_lengths_compares_and_a_task_of_other_lengths_does_not(tmp_path):
    task = {"val/bpb": None, "gzip_bpb": None, "xz_bpb": None, "val_bytes": None, "val/accuracy": 0.5}
    for i, length in enumerate((64, 128)):
        make_run(tmp_path / f"text/{i}", settings={"data.seq_len": length})
        folder = make_run(tmp_path / f"task/{i}", settings={"data.seq_len": length}, facts=task)
        config = folder / "config.yaml"
        config.write_text(
            config.read_text().replace("  source: stdlib\n", "  source: synthetic\n  synthetic:\n    task: mqar\n")
        )
    assert [len(one.points) for one in compared(tmp_path / "text")] == [2]
    assert [(one.title, len(one.points)) for one in compared(tmp_path / "task")] == [("synthetic mqar", 1)] * 2


def test_a_diverged_seed_is_said_and_a_diverged_point_comes_last(tmp_path):
    for i, (pattern, bpb) in enumerate([("T", math.nan), ("M", 2.0), ("M", math.inf), ("TM", 3.0)]):
        make_run(tmp_path / str(i), pattern=pattern, seed=i, bpb=bpb)
    (one,) = compared(tmp_path)
    assert [point.name for point in one.points] == ["M", "TM", "T"]
    assert [point.name for point, _ in one.ranked()] == ["M", "TM"]
    assert any("Not a number in some run of M; T" in note for note in one.notes)


def test_the_same_seed_twice_is_said(tmp_path):
    for i in range(2):
        make_run(tmp_path / str(i))
    (one,) = compared(tmp_path)
    assert any("Runs of the same seed are in the mean of TM" in note for note in one.notes)


def test_a_job_that_left_nothing_stands_beside_the_runs(tmp_path):
    make_run(tmp_path / "0", pattern="T")
    make_job(tmp_path / "1", 1, "failed", error="no such file", overrides=['model.pattern="M"'])
    (one,) = compared(tmp_path, ["model.pattern"])
    assert [one.settings_of(run) for run in one.lost] == [("M",)]
    assert verdict(one)[-1] == "Not in the comparison: 1 failed."


def test_nothing_has_finished(tmp_path):
    make_run(tmp_path / "0", bpb=None)
    (one,) = compared(tmp_path)
    assert verdict(one) == [
        "No run has finished with a validation: there is nothing to compare.",
        "Not in the comparison: 1 unfinished.",
    ]


def runs_of(folder, figures):
    for pattern, values in figures.items():
        for seed, bpb in enumerate(values):
            make_run(folder / f"{pattern}-{seed}", pattern=pattern, seed=seed, bpb=bpb)
    (one,) = compared(folder)
    return verdict(one)


def test_verdict_of_one_seed_each(tmp_path):
    said = runs_of(tmp_path, {"T": [2.0], "M": [1.9]})
    assert said[:2] == ["M is best: 1.9000 bits per byte (one seed).", "Next is T, worse by 0.1000."]
    assert "nothing can be concluded about small differences" in said[2]


def test_verdict_outside_the_spread(tmp_path):
    said = runs_of(tmp_path, {"T": [2.0, 2.02], "M": [1.9, 1.92]})
    assert said == [
        "M is best: 1.9100 bits per byte (mean of 2 seeds, standard deviation 0.014).",
        "Next is T, worse by 0.1000, which is outside the pooled spread over seeds of 0.014.",
    ]


def test_verdict_within_the_spread_names_what_is_cheapest(tmp_path):
    said = runs_of(tmp_path, {"T": [2.0, 2.2], "M": [1.95, 2.15], "TM": [3.0, 3.1]})
    assert said[1] == "Next is T, worse by 0.0500, which is within the pooled spread over seeds of 0.14."
    assert said[2] == "No difference from the best: T. Of these: smallest cache M."
    assert (
        said[3] == "The first that is worse by more than its pooled spread is TM: by 1.0000 against a spread of 0.11."
    )


def test_verdict_of_one_point(tmp_path):
    assert runs_of(tmp_path, {"T": [2.0]}) == [
        "One point, T: 2.0000 bits per byte (one seed). There is nothing to compare it with."
    ]


def test_each_point_at_its_best_learning_rate(tmp_path):
    tried = [("T", 0.01, 2.0), ("T", 0.02, 1.5), ("M", 0.01, 1.8), ("M", 0.02, math.nan), ("M", 0.03, 1.9)]
    for i, (pattern, lr, bpb) in enumerate(tried):
        overrides = [f"model.pattern={pattern}", f"optim.lr={lr}"]
        make_run(tmp_path / str(i), pattern=pattern, bpb=bpb, settings={"optim.lr": lr}, overrides=overrides)
    (all_of_them,) = compared(tmp_path)
    one = best_of(all_of_them, ["optim.lr"])
    assert [point.name for point in one.points] == ["T, lr=0.02", "M, lr=0.01"]
    assert len(one.runs) == 5, "the others are still counted and listed"
    assert "3, are in report.csv" in one.notes[0]
    assert "optim.lr (0.01, 0.02, 0.03)" in one.notes[0]
    assert verdict(one)[0].startswith("T, lr=0.02 is best: 1.5000")
    assert best_of(all_of_them, ["model.d_model"]) == all_of_them


@pytest.mark.parametrize("lost", ["nan", "failed"])
def test_the_best_value_is_not_the_one_that_diverged_in_other_seeds(tmp_path, lost):
    for i, (lr, bpb) in enumerate([(0.01, 2.0), (0.01, 2.1), (0.1, 1.9)]):
        make_run(tmp_path / str(i), seed=i, bpb=bpb, settings={"optim.lr": lr}, overrides=[f"optim.lr={lr}"])
    given = {"seed": 3, "settings": {"optim.lr": 0.1}, "overrides": ["optim.lr=0.1"]}
    make_run(tmp_path / "3", bpb=math.nan if lost == "nan" else None, **given)
    if lost == "failed":
        (tmp_path / "3/job.json").write_text('{"status": "failed", "error": "the loss is not finite"}')
    (all_of_them,) = compared(tmp_path)
    assert [point.name for point in all_of_them.points] == ["lr=0.1", "lr=0.01"]
    assert [point.name for point in best_of(all_of_them, ["optim.lr"]).points] == ["lr=0.01"]


def test_failed_runs_alone_have_columns_and_no_points(tmp_path):
    for i, pattern in enumerate("TM"):
        make_job(tmp_path / str(i), i, "failed", error="x", overrides=[f"model.pattern={pattern}"])
    (one,) = compared(tmp_path, ["model.pattern"])
    assert (one.points, len(one.lost)) == ((), 2)

"""Which runs are compared, and how they are grouped into configurations."""

from __future__ import annotations

import math

import pytest
from run_folders import make_job, make_run

from hybridlm.report.comparison import best_of, compare
from hybridlm.report.runs import read_folders
from hybridlm.report.verdict import notes, verdict


def compared(folder, varied=()):
    return compare(read_folders([folder])[0], varied)


def test_seeds_of_one_configuration_are_grouped(tmp_path):
    for i, (pattern, seed, bpb) in enumerate(
        [("T", 0, 2.0), ("T", 1, 2.2), ("M", 0, 1.5), ("M", 1, 1.7), ("M", 2, 1.6)]
    ):
        make_run(tmp_path / str(i), pattern=pattern, seed=seed, bpb=bpb)
    (one,) = compared(tmp_path)
    assert one.columns == ("model.pattern",)
    assert [(group.name, len(group.runs)) for group in one.configurations] == [("M", 3), ("T", 2)]
    assert one.configurations[0].spread(one.quality).mean == pytest.approx(1.6)


def test_paths_and_loggers_do_not_separate_configurations(tmp_path):
    for i in range(2):
        make_run(
            tmp_path / str(i),
            seed=i,
            settings={"data.out": f"/data/{i}", "logger.project": f"p{i}", "trainer.headless": bool(i)},
        )
    (one,) = compared(tmp_path)
    assert [len(group.runs) for group in one.configurations] == [2]
    assert one.columns == ()


def test_columns_are_varied_fields_then_fields_that_separate_the_rest(tmp_path):
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
    assert sorted(group.name for group in one.configurations) == [
        "lr=0.01, d_model=64",
        "lr=0.02, d_model=64",
        "lr=0.02, d_model=96",
    ]


def test_a_logger_group_is_not_a_column(tmp_path):
    make_run(tmp_path / "0", seed=0, settings={"logger.name": "wandb"}, overrides=["logger=wandb"])
    make_run(tmp_path / "1", seed=1, overrides=["logger=files"])
    (one,) = compared(tmp_path)
    assert (one.columns, [len(group.runs) for group in one.configurations]) == ((), [2])


def test_devices_separate_configurations(tmp_path):
    for i, device in enumerate(("CPU, 1 threads", "NVIDIA X")):
        make_run(tmp_path / str(i), facts={"device": device})
    (one,) = compared(tmp_path)
    assert one.columns == ("device",)
    assert len(one.configurations) == 2
    assert any("different devices" in note for note in notes(one))


def test_the_number_of_threads_does_not_separate_configurations(tmp_path):
    for i in range(2):
        make_run(tmp_path / str(i), seed=i, facts={"device": f"CPU, {1 + i} threads"})
    (one,) = compared(tmp_path)
    assert [len(group.runs) for group in one.configurations] == [2]
    assert any("numbers of threads" in note for note in notes(one)), "the speeds do not compare"


def test_widths_set_by_matching_are_not_columns(tmp_path):
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
    assert len(one.configurations) == 3


def test_a_setting_varied_only_by_a_failed_run_is_a_column_but_not_in_names(tmp_path):
    for pattern in "TM":
        make_run(tmp_path / pattern, pattern=pattern)
    make_run(tmp_path / "lost", bpb=None, settings={"optim.lr": 1.0}, overrides=["model.pattern=TM", "optim.lr=1.0"])
    (one,) = compared(tmp_path)
    assert one.columns == ("model.pattern", "optim.lr")
    assert sorted(group.name for group in one.configurations) == ["M", "T"]
    assert one.name_of(one.configurations[0].settings) == one.configurations[0].name


def test_a_different_validation_text_is_a_different_comparison(tmp_path):
    make_run(tmp_path / "0", pattern="T", bpb=1.0)
    make_run(tmp_path / "1", pattern="M", bpb=2.0)
    make_run(tmp_path / "2", pattern="TM", bpb=0.5, facts={"val_bytes": 1000}, settings={"data.val_fraction": 0.2})
    make_run(tmp_path / "3", pattern="MT", bpb=None, settings={"data.val_fraction": 0.2})
    first, second = compared(tmp_path)
    assert [group.name for group in first.configurations] == ["T", "M"]
    assert [group.name for group in second.configurations] == ["TM"]
    assert (first.unfinished, [run.name for run in second.unfinished]) == ((), ["3"])


def test_the_same_text_with_a_different_tokenizer_compares_with_a_note(tmp_path):
    make_run(tmp_path / "0", bpb=1.0)
    make_run(tmp_path / "1", bpb=2.0, settings={"data.tokenizer.vocab_size": 1024})
    (one,) = compared(tmp_path)
    assert one.columns == ("data.tokenizer.vocab_size",)
    assert any("different tokenizers" in note for note in notes(one))


def test_training_settings_of_a_task_do_not_change_the_task(tmp_path):
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
    assert not any("tokenizers" in note for note in notes(first)), "a task has its own tokens"
    assert (len(first.configurations), [len(one.configurations) for one in others]) == (5, [1, 1, 1])


def test_without_bits_per_byte_the_data_have_to_be_the_same(tmp_path):
    task = {"val/bpb": None, "gzip_bpb": None, "xz_bpb": None}
    make_run(tmp_path / "0", pattern="T", facts={**task, "val/accuracy": 0.5})
    make_run(tmp_path / "1", pattern="M", facts={**task, "val/accuracy": 0.9})
    make_run(tmp_path / "2", facts={**task, "val/accuracy": 1.0}, settings={"data.tokenizer.vocab_size": 1024})
    first, second = compared(tmp_path)
    assert first.quality.key == "val/accuracy"
    assert [group.name for group in first.configurations] == ["M", "T"], "more is better"
    assert len(second.configurations) == 1


def test_the_window_length_changes_a_task_but_not_a_text(tmp_path):
    task = {"val/bpb": None, "gzip_bpb": None, "xz_bpb": None, "val_bytes": None, "val/accuracy": 0.5}
    for i, length in enumerate((64, 128)):
        make_run(tmp_path / f"text/{i}", settings={"data.seq_len": length})
        folder = make_run(tmp_path / f"task/{i}", settings={"data.seq_len": length}, facts=task)
        config = folder / "config.yaml"
        config.write_text(
            config.read_text().replace("  source: stdlib\n", "  source: synthetic\n  synthetic:\n    task: mqar\n")
        )
    assert [len(one.configurations) for one in compared(tmp_path / "text")] == [2]
    assert [(one.title, len(one.configurations)) for one in compared(tmp_path / "task")] == [("synthetic mqar", 1)] * 2


def test_a_diverged_seed_is_noted_and_a_diverged_configuration_ranks_last(tmp_path):
    for i, (pattern, bpb) in enumerate([("T", math.nan), ("M", 2.0), ("M", math.inf), ("TM", 3.0)]):
        make_run(tmp_path / str(i), pattern=pattern, seed=i, bpb=bpb)
    (one,) = compared(tmp_path)
    assert [group.name for group in one.configurations] == ["M", "TM", "T"]
    assert [group.name for group, _ in one.ranked()] == ["M", "TM"]
    assert any("diverged" in note and "M; T" in note for note in notes(one))


def test_a_repeated_seed_is_noted(tmp_path):
    for i in range(2):
        make_run(tmp_path / str(i))
    (one,) = compared(tmp_path)
    assert any("same seed" in note and "TM" in note for note in notes(one))


def test_a_job_without_a_run_is_listed_as_unfinished(tmp_path):
    make_run(tmp_path / "0", pattern="T")
    make_job(tmp_path / "1", 1, "failed", error="no such file", overrides=['model.pattern="M"'])
    (one,) = compared(tmp_path, ["model.pattern"])
    assert [one.settings_of(run) for run in one.unfinished] == [{"model.pattern": "M"}]
    assert "1 failed" in verdict(one)[-1]


def test_each_model_at_its_best_learning_rate(tmp_path):
    tried = [("T", 0.01, 2.0), ("T", 0.02, 1.5), ("M", 0.01, 1.8), ("M", 0.02, math.nan), ("M", 0.03, 1.9)]
    for i, (pattern, lr, bpb) in enumerate(tried):
        overrides = [f"model.pattern={pattern}", f"optim.lr={lr}"]
        make_run(tmp_path / str(i), pattern=pattern, bpb=bpb, settings={"optim.lr": lr}, overrides=overrides)
    (all_of_them,) = compared(tmp_path)
    one = best_of(all_of_them, ["optim.lr"])
    assert [group.name for group in one.configurations] == ["T, lr=0.02", "M, lr=0.01"]
    assert len(one.runs) == 5, "the others are still counted and listed"
    assert "3, are in report.csv" in notes(one)[0]
    assert "optim.lr (0.01, 0.02, 0.03)" in notes(one)[0]
    assert verdict(one)[0].startswith("T, lr=0.02 is best: 1.5000")
    assert best_of(all_of_them, ["model.d_model"]) == all_of_them


@pytest.mark.parametrize("lost", ["nan", "failed"])
def test_a_value_that_diverged_with_other_seeds_is_not_the_best(tmp_path, lost):
    for i, (lr, bpb) in enumerate([(0.01, 2.0), (0.01, 2.1), (0.1, 1.9)]):
        make_run(tmp_path / str(i), seed=i, bpb=bpb, settings={"optim.lr": lr}, overrides=[f"optim.lr={lr}"])
    given = {"seed": 3, "settings": {"optim.lr": 0.1}, "overrides": ["optim.lr=0.1"]}
    make_run(tmp_path / "3", bpb=math.nan if lost == "nan" else None, **given)
    if lost == "failed":
        make_job(tmp_path / "3", 3, "failed", error="the loss is not finite")
    (all_of_them,) = compared(tmp_path)
    assert [group.name for group in all_of_them.configurations] == ["lr=0.1", "lr=0.01"]
    assert [group.name for group in best_of(all_of_them, ["optim.lr"]).configurations] == ["lr=0.01"]


def test_only_failed_runs_have_columns_but_no_configurations(tmp_path):
    for i, pattern in enumerate("TM"):
        make_job(tmp_path / str(i), i, "failed", error="x", overrides=[f"model.pattern={pattern}"])
    (one,) = compared(tmp_path, ["model.pattern"])
    assert (one.configurations, len(one.unfinished)) == ((), 2)

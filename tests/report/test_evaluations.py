"""Evaluations and accuracy by length, as tables."""

from __future__ import annotations

from run_folders import make_run

from hybridlm.report.comparison import compare
from hybridlm.report.evaluations import accuracy_by_length, evaluation_table
from hybridlm.report.metrics import Spread
from hybridlm.report.runs import read_folders


def test_evaluations_by_configuration(tmp_path):
    records = [
        {"what": "loss", "settings": {"context": 64, "limit": None}, "metrics": {"bpb": 9.0}},
        {
            "what": "loss",
            "settings": {"context": 64, "limit": None},
            "metrics": {"bpb": 2.0, "note": "x"},
        },  # a later one of the same
        {"what": "task/arc", "metrics": {"acc": 0.25}, "ema": True},
        "damaged",
    ]
    for i, pattern in enumerate("TTM"):
        make_run(
            tmp_path / str(i), pattern=pattern, seed=i, bpb=1.0 + i, facts={"probe/induction": 0.5} if i == 1 else None
        )
    (tmp_path / "0/eval.json").write_text(
        str({"format_version": 1, "results": records}).replace("'", '"').replace("None", "null").replace("True", "true")
    )
    (tmp_path / "1/eval.json").write_text(
        '{"results": [{"what": "loss", "settings": {"context": 64}, "metrics": {"bpb": 3.0}}]}'
    )
    (one,) = compare(read_folders([tmp_path])[0])
    table = evaluation_table(one)
    assert [column.heading for column in table.columns] == ["evaluation", "settings", "metric", "T"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["loss", "context=64", "bpb", "2.5 ± 0.71"],
        ["task/arc", "EMA weights", "acc", "0.25"],
        ["probe/induction", "during training", "", "0.5"],
    ]


def test_shares_by_length(tmp_path):
    make_run(
        tmp_path / "0",
        facts={
            "val/accuracy": 0.7,
            "val/accuracy/64": 0.9,
            "val/accuracy/128": 0.5,
            "val/exact/64": 0.1,
            "val/loss/64": 0.2,
        },
    )
    (one,) = compare(read_folders([tmp_path])[0])
    assert accuracy_by_length(one) == {"accuracy": [{64: Spread(0.9, None, 1), 128: Spread(0.5, None, 1)}]}, (
        "a single length is no curve, and a loss is no share"
    )

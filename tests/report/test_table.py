"""Tables: rows of failed jobs, scales, Markdown, and CSV that is read back."""

from __future__ import annotations

import csv
import io
import math

from run_folders import make_job, make_run

from hybridlm.report.comparison import compare
from hybridlm.report.runs import read_folders
from hybridlm.report.table import configurations_table, markdown, to_csv, to_markdown


def table_of(folder):
    (one,) = compare(read_folders([folder])[0])
    return configurations_table(one)


def columns(table):
    return {
        column.heading: [row[i].text for row in table.rows if i < len(row)] for i, column in enumerate(table.columns)
    }


def test_a_row_per_configuration_with_mean_and_spread(tmp_path):
    for i, (pattern, bpb, speed) in enumerate(
        [("T", 2.0, 900.0), ("T", 2.2, 1100.0), ("M", 1.8, 2e4), ("M", 1.84, 2.1e4), ("TM", 1.85, 5e3)]
    ):
        make_run(tmp_path / str(i), pattern=pattern, seed=i, bpb=bpb, facts={"tokens_per_s": speed})
    table = table_of(tmp_path)
    found = columns(table)
    assert found["model.pattern"] == ["M", "TM", "T"]
    assert found["bits per byte"] == ["1.8200 ± 0.0283", "1.8500", "2.1000 ± 0.1414"]
    assert found["vs best"] == ["best", "+0.0300", "+0.2800"], (
        "0.0300 lies outside 0.0283, the spread of the only one of the two repeated"
    )
    assert found["runs"] == ["2", "1", "2"]
    assert found["training speed"] == ["20,500 ± 707", "5,000", "1,000 ± 141"]
    assert found["decode cache of one window"] == ["39.5", "83.8", "128.0"]
    assert {column.heading: column.unit for column in table.columns}["decode cache of one window"] == "KiB"
    assert found["device time"] == ["0.0100"] * 3
    assert "validation loss" not in found


def test_a_difference_within_the_spread_is_printed_as_none(tmp_path):
    for i, (pattern, bpb) in enumerate([("T", 2.0), ("T", 2.2), ("M", 1.99), ("M", 2.19)]):
        make_run(tmp_path / str(i), pattern=pattern, seed=i, bpb=bpb)
    assert columns(table_of(tmp_path))["vs best"] == ["best", "no difference"]


def test_an_unknown_spread_is_marked(tmp_path):
    for i, (pattern, bpb) in enumerate([("T", 2.0), ("M", 1.99)]):
        make_run(tmp_path / str(i), pattern=pattern, bpb=bpb)
    assert columns(table_of(tmp_path))["vs best"] == ["best", "+0.0100 ?"]


def test_unfinished_jobs_are_rows_with_their_error(tmp_path):
    make_run(tmp_path / "0", pattern="T")
    make_run(tmp_path / "1", pattern="M", seed=4, bpb=None)
    make_job(
        tmp_path / "2", 2, "failed", overrides=['model.pattern="TM"'], error="RuntimeError: out | of memory", seed=1
    )
    table = table_of(tmp_path)
    assert [[cell.text for cell in row] for row in table.rows[1:]] == [
        ["-", "M", "unfinished (run 1, seed 4): no summary.json; the last metrics are from step 40"],
        ["-", "TM", "failed (run 2, seed 1): RuntimeError: out | of memory"],
    ]
    lines = to_markdown(table).splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1, "every line has every column"
    assert r"out \| of memory" in lines[-1]


def test_csv_is_read_back(tmp_path):
    make_run(
        tmp_path / "a,b", pattern="T", bpb=1.23456789012345, facts={"val/loss": math.nan}, settings={"optim.lr": 0.01}
    )
    make_run(
        tmp_path / 'quo"te',
        pattern="M",
        seed=7,
        settings={"optim.lr": 0.02},
        overrides=["++a='x y'", '++model.pattern="M"'],
    )
    make_job(tmp_path / "c", 2, "failed", error="line one\nline two", overrides=["++seed=1"], seconds=3.5)
    runs, _ = read_folders([tmp_path])
    read = list(csv.DictReader(io.StringIO(to_csv(compare(runs)))))
    by_name = {row["run"]: row for row in read}
    assert [row["status"] for row in read] == ["finished", "finished", "failed"]
    assert float(by_name["a,b"]["val/bpb"]) == 1.23456789012345
    assert math.isnan(float(by_name["a,b"]["val/loss"]))
    assert (by_name['quo"te']["seed"], by_name['quo"te']["model.pattern"]) == ("7", "M")
    assert by_name['quo"te']["command"] == """python train.py 'a='"'"'x y'"'"'' 'model.pattern="M"'"""
    assert (by_name["c"]["error"], by_name["c"]["val/bpb"], by_name["c"]["seconds"]) == ("line one line two", "", "3.5")


def test_nothing_in_a_name_is_markdown():
    assert markdown("a|b *c* `d`\n<script>&") == r"a\|b \*c\* \`d\` &lt;script&gt;&amp;"

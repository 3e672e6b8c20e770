"""Measurements as rows and as a table."""

from __future__ import annotations

import pytest
from rich.console import Console

from hybridlm.bench.measurement import Measurement, Round
from hybridlm.bench.report import print_rows, rows

MEASURED = [
    Measurement("T", 1, 512, 10, 40, 2**20, rounds=[Round(1.0, (0.2, 0.2), 5 * 2**20), Round(1.0, (0.4, 0.4), None)]),
    Measurement("M", 1, 512, 10, 40, 2**18, rounds=[Round(0.5, (0.1, 0.1), None), Round(0.5, (0.1, 0.1), None)]),
    Measurement("T", 1, 1024, 10, 40, 2**21, left_out="over 1 s"),
    Measurement("M", 1, 1024, 10, 40, 2**18, rounds=[Round(0.5, (0.1,), None)]),
]


def test_ratios_are_relative_to_the_first_model_of_the_same_setting():
    found = rows(MEASURED)
    assert [row.get("decode_ratio") for row in found] == [None, pytest.approx(3.0), None, None]
    assert (found[1]["decode_ratio_low"], found[1]["decode_ratio_high"]) == (pytest.approx(2.0), pytest.approx(4.0))
    assert [row["rounds"] for row in found] == [2, 2, 0, 1]


def test_the_table_says_what_was_left_out():
    console = Console(record=True, width=150)
    print_rows(rows(MEASURED), console)
    text = console.export_text()
    for cell in ("1,024", "1.00 MiB", "5.00 MiB", "3.00 [2.00, 4.00]", "left out", "over 1 s"):
        assert cell in text

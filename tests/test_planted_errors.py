"""The errors that `python tests/planted_errors.py` plants still fit the code: each old text stands in its file exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_list import PLANTS, Plant

PACKAGE = Path(__file__).parents[1] / "hybridlm"


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_error_fits_the_code(plant: Plant):
    for file, old, new in plant.changes:
        text = (PACKAGE / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{file}: {old!r}"
        assert old != new


def test_names_differ():
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)

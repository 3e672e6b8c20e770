"""`hybridlm check` passes for every preset, at the size that tests take."""

from __future__ import annotations

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.config.groups import groups
from hybridlm.eval.gate import gate
from hybridlm.eval.gate_subject import Subject


@pytest.mark.parametrize("preset", groups()["model"])
def test_a_preset_passes(preset):
    rows = list(gate(Subject.of(compose_config([f"model={preset}", "size=tiny"]))))
    assert [f"{row.name}: {row.error:.1e} {row.note}" for row in rows if row.status == "fail"] == []

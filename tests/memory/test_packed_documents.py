"""Packed documents, and conversations, which are packed, can be planned in every kind of layer."""

from __future__ import annotations

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.memory.plan import plan_run


@pytest.mark.parametrize("kind", ["T", "M1", "M2", "M3", "L", "G", "K"])
@pytest.mark.parametrize("hardware", ["cpu", "rtx4060"])
def test_packed_documents_are_planned(tiny, kind, hardware):
    small = [
        *tiny,
        "model.mla.n_heads=2",
        "model.gdn.n_v_heads=2",
        "model.kda.n_v_heads=2",
        "model.mamba3.d_state=8",
        "model.mamba3.head_dim=16",
        f"hardware={hardware}",
    ]
    packed = ["data.packing=true", "data.isolate=true", f"model.pattern={kind}"]
    assert plan_run(compose_config([*small, *packed])).fits

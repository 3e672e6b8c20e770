"""Patterns at equal cost: the counts are those of built models, and a resumed run keeps its numbers."""

from __future__ import annotations

import json
import re
import time
from functools import cache

import pytest
import yaml

from hybridlm.cli.compose import compose_config
from hybridlm.cli.start import main
from hybridlm.errors import UserError
from hybridlm.model.build import build_model
from hybridlm.model.count import flops_per_token, parameters
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.matching import TOLERANCE, matched

PATTERNS = [
    "T",
    "MMMT",
    "M",
    "M:none",
    "M3*2 T",
    "M1",
    "M1:mlp T:none",
    "L:moe M",
    "(M M M L:moe)*2",
    "M1 M2 M3 T",
    "T:moe",
]


def cost(config, by):
    model = build_model(config.model, config.model.vocab_size or config.data.tokenizer.vocab_size)
    return parameters(model) if by == "params" else flops_per_token(model, config.data.seq_len, "train")


@cache
def base(size):
    return compose_config(["model=hybrid_alternating", f"size={size}"])


@pytest.mark.parametrize("size", ["tiny", "d12"])
@pytest.mark.parametrize("by", ["params", "flops"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_is_matched_to_the_reference(pattern, by, size):
    def with_pattern(letters):
        return base(size).model_copy(update={"model": base(size).model.model_copy(update={"pattern": letters})})

    given, reference = with_pattern(pattern), with_pattern("T")
    config = matched(given.model_copy(update={"sweep": given.sweep.model_copy(update={"match": by})})).config
    assert cost(config, by) == pytest.approx(cost(reference, by), rel=TOLERANCE[by])
    assert f"{round(cost(config, by)):,}" in (config.sweep.matched or "")
    assert len(config.model.layers) == len(reference.model.layers)
    for spec in config.model.layers:
        assert all(getattr(spec.ffn, name, 0) % 8 == 0 for name in ("d_ff", "d_expert"))
        assert getattr(spec.params, "head_dim", 8) % 8 == 0


def test_the_first_width_that_suffices_changes():
    before = base("default").model

    def changed(*given):
        model = compose_config(["model=hybrid_alternating", *given, "sweep.match=params"]).model
        return {
            name
            for name in ("d_model", "mlp", "mamba1", "mamba2", "attention")
            if getattr(model, name) != getattr(before, name)
        }

    assert changed() == {"mlp"}
    assert changed("model.pattern=M1", "model.ssm=mamba1") == {"mamba1"}
    assert changed("model.pattern=T:none") == {"d_model"}
    assert changed("model.pattern=T") == set()
    assert changed("model.pattern=M:none", "model.mamba2.head_dim=256") == {"d_model", "mamba2"}


def test_an_unreachable_cost_gives_the_nearest_with_a_note():
    config = compose_config(
        ["model=hybrid_alternating", "model.pattern=T:none", "sweep.match=params", "sweep.target=400000000"]
    )
    assert (config.sweep.matched or "").endswith(", the nearest possible")
    assert config.model.d_model == 4 * 256


def test_another_reference_a_number_and_heads_that_are_given():
    by_pattern = compose_config(
        ["model=hybrid_alternating", "model.pattern=T", "sweep.match=params", "sweep.reference=M3"]
    )
    assert "pattern M3 " in (by_pattern.sweep.matched or "")
    by_number = compose_config(["model=hybrid_alternating", "sweep.match=flops", "sweep.target=50000000"])
    assert cost(by_number, "flops") == pytest.approx(50e6, rel=0.02)
    heads = compose_config(
        ["model=hybrid_alternating", "model.pattern=M:none", "model.mamba2.n_heads=8", "sweep.match=params"]
    ).model.mamba2
    assert heads.n_heads is not None
    assert heads.n_heads * heads.head_dim == heads.expand * 256


def test_it_is_quick():
    config = compose_config(
        ["model=hybrid_alternating", "size=d12", "model.pattern=[M3:none, M:none, M1, T:none, L:none, T:none]"]
    )
    config = config.model_copy(update={"sweep": config.sweep.model_copy(update={"match": "params"})})
    began = time.process_time()
    matched(config)
    assert time.process_time() - began < 2  # of this process alone, so that a busy machine does not matter


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["sweep.match=parameters"], "sweep.match = 'parameters': expected"),
        (["sweep.match=params", "sweep.reference=TX"], "sweep.reference = 'TX': model.pattern"),
        (["sweep.target=5"], "sweep.target = 5: needs sweep.match"),
        (["sweep.match=params", "sweep.target=0"], "sweep.target = 0: expected an integer >= 1"),
        (["sweep.match=params", "data.tokenizer.kind=file", "data.tokenizer.path=nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes(given, problem):
    with pytest.raises(UserError) as caught:
        compose_config(["model=hybrid_alternating", *given])
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]


def test_a_run_keeps_its_matched_numbers(tiny, tmp_path, monkeypatch, capsys):
    """In config.yaml, weights and summary; resumed it is not matched again, even where the match would come out
    differently today."""
    monkeypatch.chdir(tmp_path)
    main([*tiny, "sweep.match=params", "model.pattern=MMT", "hydra.run.dir=run"])
    folder = RunFolder(tmp_path / "run")
    config = yaml.safe_load(folder.config.read_text())
    assert config["model"]["mlp"]["d_ff"] != 48
    assert (config["sweep"]["match"], config["sweep"]["matched"][:20]) == (
        "params",
        f"model.mlp.d_ff 48 -> {config['model']['mlp']['d_ff']}"[:20],
    )
    assert f"{json.loads(folder.summary.read_text())['parameters']:,} parameters" in config["sweep"]["matched"]
    monkeypatch.setattr("hybridlm.sweep.matching._MULTIPLES", (1,))
    main(["ckpt=run", "trainer.max_steps=14"])
    again = yaml.safe_load(folder.config.read_text())
    assert (again["model"], again["sweep"]) == (config["model"], config["sweep"])
    assert json.loads(folder.summary.read_text())["steps"] == 14
    with pytest.raises(SystemExit) as end:
        main(["ckpt=run", "model.mlp.d_ff=64"])
    assert end.value.code == 2
    assert re.search(r"model\.mlp\.d_ff: \d+ -> 64", capsys.readouterr().err)

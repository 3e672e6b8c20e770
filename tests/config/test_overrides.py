"""The command line, prepared for Hydra: repaired keys, quoted patterns and paths, merged overrides."""

from __future__ import annotations

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.config.overrides import merged, quoted_pattern, repair, split, typed, value_of

GROUPS = ("model", "size", "data", "experiments")


def test_repair():
    given = [
        "model=x",
        "+model=y",
        "seed=1",
        "+a.b=c",
        "++a.b=c",
        "~a.b",
        "hydra.run.dir=z",
        "hydra/launcher=joblib",
        "experiments=a/b",
    ]
    wanted = [
        "model=x",
        "model=y",
        "++seed=1",
        "++a.b=c",
        "++a.b=c",
        "~a.b",
        "hydra.run.dir=z",
        "hydra/launcher=joblib",
        "experiments=a/b",
    ]
    assert repair(given, GROUPS) == wanted
    assert split(["a=1", "--cfg", "job", "b=2", "-m", "--info", "c=3"]).overrides == ("a=1", "b=2", "c=3")


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("(TM)*6", '"(TM)*6"'),
        ("(TM)*6,T*12", '"(TM)*6","T*12"'),
        ('"(TM)*6",T', '"(TM)*6","T"'),
        ("'(TM)*6'", "'(TM)*6'"),
        ("[T,M],[(TM)*2]", '["T","M"],["(TM)*2"]'),
        ("null", "null"),
        ("choice(T,M)", "choice(T,M)"),
        ("T*60% M*40%", '"T*60% M*40%"'),
        ("(TM", '"(TM"'),
        ("T#é", '"T#é"'),
    ],
)
def test_patterns_are_quoted(value, quoted):
    assert quoted_pattern(value) == quoted


def test_merging_replaces_by_key():
    assert merged(["model=a", "++x.y=1", "~z"], ["++x.y=2", "model=b"]) == ["~z", "++x.y=2", "model=b"]


@pytest.mark.parametrize(
    "path",
    [
        "a (1)/x=y #2.txt",
        "[D]/x*.txt",
        "a,b.txt",
        "it's.txt",
        'q".txt',
        "语/*.{md,rst}",
        "~/x",
        "C:\\data\\x.txt",
        "end\\",
        "2024",
        "\\'x",
        "true",
    ],
)
def test_a_path_needs_no_quoting_beyond_the_shells(path):
    assert compose_config(["data=files", f"data.path={path}"]).data.path == path
    repaired = repair([f"ckpt={path}"], set())
    assert value_of(repaired, "ckpt") == path
    assert typed(repaired[0]) == f"ckpt={path}"  # as a hint prints it


def test_a_hint_types_what_was_typed():
    for line in (
        "model.pattern=(TM)*3",
        "data.path=docs/*.md",
        "optim.lr=1e-3",
        "model=mamba",
        "callbacks.samples.prompts=['a b']",
    ):
        (repaired,) = repair([line], {"model"})
        assert typed(repaired) == line
        assert repair([typed(repaired)], {"model"}) == [repaired]


def test_lists_of_paths_and_sweeps_over_them(tmp_path, monkeypatch):
    assert compose_config(["data=files", "data.path=[a.txt,b (1).txt]"]).data.path == ("a.txt", "b (1).txt")
    assert repair(["data.path=a b,c(1).{x,y}"], set(), several=True) == ["++data.path='a b','c(1).{x,y}'"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert repair(["data.path=a,b"], set(), several=True) == ["++data.path='a,b'"]  # it exists
    once = repair(["data.path=it's"], set())
    assert repair(once, set()) == once

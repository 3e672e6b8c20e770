"""``train --help``: common tasks, options, and a sentence for every field."""

from __future__ import annotations

import re

import pytest

from hybridlm.config.data import PartConfig
from hybridlm.config.groups import groups
from hybridlm.config.help_page import COMMON, help_page
from hybridlm.config.problems import section_type
from hybridlm.config.run import RunConfig


def leaves(section, path=()):
    for name, info in section.model_fields.items():
        inner = section_type(info.annotation)
        if inner is None:
            yield ".".join((*path, name)), info
        else:
            yield from leaves(inner, (*path, name))


FIELDS = dict(leaves(RunConfig))


@pytest.mark.parametrize("section", [RunConfig, PartConfig])
def test_every_field_has_a_sentence(section):
    said = {name: info.description for name, info in leaves(section)}
    assert [name for name, text in said.items() if not text] == []
    assert [name for name, text in said.items() if len(text) < 7 or text.endswith(".")] == []


def test_the_page_has_every_group_option_and_field_with_its_value():
    tree = {
        "optim": {"lr": 0.25, "betas": [0.5, 0.75]},
        "model": {"pattern": "T M", "name": "mine", "mamba2": {"d_state": 7}},
    }
    page = help_page({"model": ["a", "b"], "size": ["tiny"]}, tree)
    assert page.startswith(COMMON)
    words = " ".join(page.split())
    for name, info in FIELDS.items():
        assert re.search(rf"^  {re.escape(name)}=", page, re.MULTILINE), name
        assert " ".join(info.description.split()) in words, name
    for line in (
        "optim.lr=0.25 ",
        "optim.betas=[0.5, 0.75] ",
        "model.pattern='T M' ",
        "model.name=mine ",
        "model.mamba2.d_state=7 ",
    ):
        assert f"\n  {line}" in page
    assert f"\n  trainer.log_every={RunConfig().trainer.log_every} " in page, "the default, where the tree has none"
    assert re.search(r"^  model=\.\.\. +a, b$", page, re.MULTILINE)
    wide = [line for line in page.splitlines() if len(line) > 110]
    assert [line for line in wide if not re.match(r"  [\w.]+=", line)] == [], "but for a value, which stays whole"


def test_common_tasks_name_what_there_is():
    known = {"group": set(groups()), "field": set(FIELDS) | {"hydra.run.dir"}}
    named = re.findall(r"(?<= )([a-z_.]+)=", COMMON)
    assert [name for name in named if name not in known["group"] | known["field"]] == []

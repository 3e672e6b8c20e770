"""Files that a stranger made in place of a saved conversation: refused in a line, or a conversation that goes on."""

from __future__ import annotations

import copy
import json
import random

import pytest
from hostile import VALUES, mutated, refused_or_read
from talk import Talk

from hybridlm.errors import UserError


@pytest.fixture
def saved(tmp_path) -> dict[str, object]:
    talk = Talk(chat=True)
    talk.conversation.reset("be brief")
    for text in ("hello", "???"):
        talk.say(text)
    talk.conversation.save(tmp_path / "a")
    return json.loads((tmp_path / "a").read_text())


def test_a_mutated_conversation_is_refused_or_goes_on(saved, tmp_path):
    talk = Talk(chat=True, context=256, tokens=3)

    def load(content: object) -> None:
        (tmp_path / "b").write_text(json.dumps(content))
        talk.conversation.load(tmp_path / "b")
        for letter in "xy":  # the oldest messages go
            talk.say(letter * 120)

    load(saved)
    for number in range(150):
        generator = random.Random(number)
        changed = mutated(saved, generator, lambda g: copy.deepcopy(g.choice(VALUES)))
        refused_or_read(lambda changed=changed: load(changed))
    for changes in (
        {"turns": [["user", "a"]]},
        {"turns": [["assistant", "a"]]},
        {"turns": [["tool", "a"]]},
        {"turns": [["user", "\ud800"], ["assistant", ""]]},
        {"turns": [["system", "a"]] * 2},
        {"open": [10**6]},
        {"ids": [10**6]},
        {"ids": []},
        {"ids": [1] * 300},
        {"tokenizer": "another"},
        {"template": False},
    ):
        with pytest.raises(UserError, match="b: "):
            load(saved | changes)
    load(saved)


def test_what_is_refused_changes_nothing(saved, tmp_path):
    talk = Talk(chat=True)
    talk.say("a")
    ids, turns = talk.ids, list(talk.conversation.turns)
    (tmp_path / "b").write_bytes(b"\xff")
    for name in ("b", "nowhere", "."):
        with pytest.raises(UserError, match=".*"):  # noqa: RUF043
            talk.conversation.load(tmp_path / name)
    assert (talk.ids, talk.conversation.turns) == (ids, turns)

"""Conversations by their tokens: only new ones are prefilled, the whole is what training would have shown, and a note
says what is dropped."""

from __future__ import annotations

import pytest
import torch
from talk import Talk

from hybridlm.errors import UserError
from hybridlm.generate.sampling import Sampling


def test_with_a_template_the_tokens_are_those_of_the_messages():
    talk = Talk(chat=True)
    talk.conversation.reset("be brief")
    answers = [talk.say("hello"), talk.say("and then?"), talk.say("x")]
    turns = talk.conversation.turns
    assert [turn.role for turn in turns] == ["system"] + ["user", "assistant"] * 3
    assert [turn.content for turn in turns[2::2]] == answers
    assert any(answers)
    want = talk.template.encode_prompt(turns, talk.tokenizer)[: -len(talk.template.prefixes["assistant"])]
    assert talk.ids == want


def test_each_turn_reads_what_is_new():
    """The second turn's first forward has the question, the end of the answer before it and its newest token, and
    nothing of the rest."""
    talk = Talk(chat=True)
    answer = talk.say("a long question " * 5)
    talk.read.clear()
    pending = 0 if talk.conversation._state.logits is not None else 1
    talk.say("hi")
    assert talk.read[0] == pending + len("hi") + 4  # the answer's end; the question's role and end; the answer's role
    assert max(talk.read[1:], default=1) == 1
    assert answer is not None


def test_a_base_model_goes_on_with_lines():
    talk = Talk(chat=False)
    first = talk.say("abc")
    assert len(talk.told) <= 1
    assert all("20 tokens" in line for line in talk.told)
    text = talk.tokenizer.decode(talk.ids)
    assert text == "abc" + first
    ended = bool(talk.conversation._open)
    second = talk.say("more")
    assert talk.tokenizer.decode(talk.ids) == text + ("" if ended else "\n") + "more" + second
    before = talk.tokenizer.decode(talk.ids)
    third = talk.say("")
    assert talk.tokenizer.decode(talk.ids) == before + third


@pytest.mark.parametrize("chat", [True, False])
def test_left_off_the_answer_stands_as_far_as_it_came(chat):
    talk = Talk(chat, tokens=50)
    talk.conversation.sampling = Sampling(seed=1, max_new_tokens=50, logit_bias={97: 1e9})
    pieces = talk.conversation.say("q")
    shown = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert shown == "aaa"
    assert talk.tokenizer.decode(talk.ids).endswith("aaa")
    if chat:
        assert talk.conversation.turns[-1] == ("assistant", "aaa")
        assert talk.ids[-1] == talk.template.end_id
    talk.say("r")
    whole = talk.conversation._state
    if whole.logits is None:
        talk.conversation.engine.decode(whole, torch.tensor(whole.ids[0][-1:]))
    with torch.no_grad():
        want = talk.model(torch.tensor(whole.ids)).logits[0, -1]
    assert float((whole.logits[0] - want).abs().max()) < 1e-4


def test_the_oldest_messages_are_forgotten_and_that_is_said():
    talk = Talk(chat=True, context=90, tokens=10)
    talk.conversation.reset("sys")
    for i in range(8):
        talk.say(f"question {i}")
        assert talk.conversation.tokens <= 90
    turns = talk.conversation.turns
    assert turns[0] == ("system", "sys")
    assert turns[-2].content == "question 7"
    assert len(turns) < 17
    told = [line for line in talk.told if "2 oldest messages" in line]
    assert told
    assert "90 tokens" in told[0]
    assert talk.ids == talk.template.encode_prompt(turns, talk.tokenizer)[:-1]


def test_the_oldest_text_is_forgotten_and_that_is_said():
    talk = Talk(chat=False, context=60, tokens=10)
    for i in range(8):
        talk.say(f"line {i}")
        assert talk.conversation.tokens <= 61
    assert any("60 tokens" in line and "oldest" in line for line in talk.told)
    assert "line 7" in talk.tokenizer.decode(talk.ids)


@pytest.mark.parametrize("chat", [True, False])
def test_what_does_not_fit_alone_is_refused_and_changes_nothing(chat):
    talk = Talk(chat, context=60, tokens=10)
    talk.say("a")
    before, turns = list(talk.ids), list(talk.conversation.turns)
    with pytest.raises(UserError, match="context of 60"):
        talk.say("b" * 60)
    assert talk.ids == before
    assert talk.conversation.turns == turns
    talk.say("c")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("pattern", ["MTM", "L M3 W"])
def test_a_saved_conversation_goes_on_as_it_would_have(chat, pattern, tmp_path):
    one, two = Talk(chat, pattern=pattern), Talk(chat, pattern=pattern)
    one.say("hello")
    one.conversation.save(tmp_path / "c")
    two.conversation.load(tmp_path / "c")
    assert two.conversation.turns == one.conversation.turns
    assert two.ids == one.ids
    for text in ("more", "and more"):
        assert two.say(text) == one.say(text)
    assert two.ids == one.ids

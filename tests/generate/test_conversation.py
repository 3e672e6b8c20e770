"""Conversations by their tokens: only new ones are read, the whole is what training would have shown, and what is
forgotten is said."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from small_models import small_config

from hybridlm.data.chat import template_of
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.generate.chat import Terminal, _command
from hybridlm.generate.conversation import Conversation
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.model.build import fresh_model

SPECIALS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


class Talk:
    """A conversation with a model of noise, whose answers are letters and end by themselves now and then."""

    def __init__(self, chat: bool, context: int = 200, tokens: int = 20, pattern: str = "MTM", seed: int = 0) -> None:
        self.tokenizer = byte_tokenizer(SPECIALS if chat else ())
        self.model = fresh_model(small_config(pattern), self.tokenizer.vocab_size, seed=seed, device="cpu")
        self.template = template_of(self.tokenizer) if chat else None
        end = self.template.end_id if self.template else self.tokenizer.eos_id
        bias = {i: -1e9 for i in range(self.tokenizer.vocab_size) if chr(i) not in "abc" and i != end}
        sampling = Sampling(seed=1, max_new_tokens=tokens, logit_bias=bias)
        self.told: list[str] = []
        self.read: list[int] = []  # tokens that each forward was given
        engine = Engine(self.model, self.tokenizer, context=context)
        self.model.register_forward_pre_hook(lambda module, given: self.read.append(given[0].shape[1]))
        self.conversation = Conversation(engine, self.tokenizer, self.template, sampling, self.told.append)

    def say(self, text: str) -> str:
        return "".join(self.conversation.say(text))

    @property
    def ids(self) -> list[int]:
        """Every token that was read or is about to be."""
        return [*self.conversation._state.ids[0], *self.conversation._open]


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


def test_commands_and_their_mistakes(tmp_path):
    talk = Talk(chat=True)
    said: list[str] = []

    def command(line: str) -> bool:
        return _command(talk.conversation, line, said.append)

    with pytest.raises(UserError, match="/save"):
        command(f"/save {tmp_path}/c")
    talk.say("a")
    for line, says in {
        "/save": "/save: expected /save FILE",
        "/load": "/load: expected /load FILE",
        "/load nowhere": "nowhere: ",
        "/temp": "/temp: expected /temp X",
        "/temp warm": "/temp warm: ",
        "/temp -1": "temperature = -1.0",
        "/temp nan": "temperature = nan",
        "/sing": "/sing; /help",
        f"/save {tmp_path}/no/where": f"{tmp_path}/no/where: ",
    }.items():
        with pytest.raises(UserError, match=".*") as caught:  # noqa: RUF043
            command(line)
        assert says in str(caught.value), line
        assert len(caught.value.problems) == 1
    assert command("/temp 0.3")
    assert talk.conversation.sampling.temperature == 0.3
    assert command(f"/save {tmp_path}/c")
    assert command("/reset")
    assert (talk.conversation.turns, talk.conversation.tokens) == ([], 0)
    assert command(f"/load {tmp_path}/c")
    assert [turn.role for turn in talk.conversation.turns] == ["user", "assistant"]
    assert command("/system be kind")
    assert talk.conversation.turns == [("system", "be kind")]
    assert command("/reset")
    assert talk.conversation.turns == [("system", "be kind")]
    assert command("/help")
    assert all(word in said[-1] for word in ("/reset", "/save", "/load", "/temp", "/system", "/quit", "/help"))
    assert not command("/quit")
    with pytest.raises(UserError, match="/system"):
        _command(Talk(chat=False).conversation, "/system x", said.append)


@pytest.mark.skipif(os.name != "posix", reason="sends itself a signal")
def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys):
    talk = Talk(chat=True, tokens=50)
    talk.conversation.sampling = Sampling(seed=1, max_new_tokens=50, logit_bias={97: 1e9})
    write, written = sys.stdout.write, []

    def writes(text: str) -> int:
        if text == "a":
            written.append(text)
            if len(written) == 4:
                os.kill(os.getpid(), signal.SIGINT)
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", writes)
    before = signal.getsignal(signal.SIGINT)
    Terminal(interactive=False).answer(talk.conversation, "q")
    assert signal.getsignal(signal.SIGINT) == before
    assert talk.conversation.turns[-1] == ("assistant", "aaaa")
    out, err = capsys.readouterr()
    assert out == "aaaa\n"
    assert err == "stopped\n"

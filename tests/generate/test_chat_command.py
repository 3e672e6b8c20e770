"""Slash commands, and Ctrl-C during an answer."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from talk import Talk

from hybridlm.errors import UserError
from hybridlm.generate.chat import Terminal, _command
from hybridlm.generate.sampling import Sampling


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

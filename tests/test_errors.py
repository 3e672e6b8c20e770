"""Texts of strangers as a terminal may take them."""

from __future__ import annotations

import io
import unicodedata

import pytest

from hybridlm.errors import for_stream, harmless, printable


@pytest.mark.parametrize("letter", [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Cc"])
def test_every_control_character_but_two_is_shown(letter):
    assert harmless(f"a{letter}b") == (f"a{letter}b" if letter in "\n\t" else f"a{printable(letter)}b")


def test_letters_stay_as_they_are():
    text = "naïve ☃ 你好 😀👩‍👩‍👧 \xa0 שלום\n\tx"
    assert harmless(text) == text


def test_a_pipe_gets_the_text_itself():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert for_stream("\x1b[2J\r", io.StringIO()) == "\x1b[2J\r"
    assert for_stream("\x1b[2J\r", Terminal()) == "\\x1b[2J\\r"

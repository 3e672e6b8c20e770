"""``hybridlm prepare``: what it prints, and what it says of mistakes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from typer.testing import CliRunner

from hybridlm.cli.verbs import app
from hybridlm.data.coloured_tokens import coloured
from hybridlm.data.tokenizer import byte_tokenizer


def prepare(*arguments: str):
    return CliRunner().invoke(app, ["prepare", *arguments])


def test_it_prepares_and_shows_documents(corpus, tmp_path):
    overrides = ["data=files", f"data.path={corpus}/lines.jsonl", f"data.out={tmp_path}", "data.tokenizer.kind=bytes"]
    done = prepare(*overrides, "--show", "2")
    assert done.exit_code == 0, done.output
    assert "prepared in" in done.output
    assert "train: " in done.output
    assert done.output.count("<eos>") == 2
    assert "return·" in done.output
    assert "already prepared" in prepare(*overrides).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=files"], "data.path = null"),
        (["data=files", "data.path=nowhere/*.txt"], "matches no file"),
        (["data=files", "data.pth=x"], "data.pth"),
        (["--shw", "3"], "unknown option --shw 3; legal: the options of `hybridlm prepare --help`"),
        (["data=bins", "data.path=nowhere.bin", "data.tokenizer.path=nowhere.json"], "nowhere.json"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(arguments, message):
    done = prepare(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_tokens_are_distinguished_by_colour():
    tokenizer = byte_tokenizer()
    shown = coloured([tokenizer.eos_id, *"a é\n".encode()], tokenizer)
    assert shown.plain == "<eos>a·\\xc3\\xa9⏎\n"
    styles = [span.style for span in shown.spans]
    assert len(styles) == 6
    assert all(first != second for first, second in pairwise(styles))

"""What the command line itself cannot mean is told in one line, as every other mistake is."""

from __future__ import annotations

import sys

import pytest

from hybridlm.cli.verbs import run_app


def ended(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        run_app(arguments)
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "last", "--batch", "0"], "'--batch'"),
        (["eval", "last", "--num-fewshot", "-1"], "'--num-fewshot'"),
        (["eval", "last", "--split", "test"], "'--split': 'test' is not one of 'val', 'train'"),
        (["bench", "--dtype", "int8"], "'--dtype': 'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["bench", "--rounds", "0"], "'--rounds'"),
        (["bench", "--budget", "nan"], "'--budget'"),
        (["prepare", "--show", "-1"], "'--show'"),
        (["generate", "last", "--top-k", "many"], "'--top-k'"),
        (["generate", "last", "one", "too", "many"], "(one too many)"),
        (["generate"], "'RUN'"),
        (["chat", "last", "--frob"], "--frob"),
        (["genrate", "last"], "'genrate'"),
        (["--frob"], "--frob"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, said):
    code, out, err = ended(capsys, *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(("config error: ", "error: "))
    assert said in line

    assert line.endswith("--help`")


def test_help_is_what_no_arguments_get(capsys):
    code, out, err = ended(capsys)
    assert (code, err) == (0, "")
    assert all(verb in out for verb in ("train", "generate", "chat", "eval", "bench"))
    assert ended(capsys, "--help") == (0, out, "")


def test_closed_streams_are_empty_ones(capsys, monkeypatch, tmp_path):
    """As after `<&-` and `>&-` in a shell."""
    (tmp_path / "config.yaml").write_text("")
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, None)
    assert "has no checkpoint yet" in ended(capsys, "chat", str(tmp_path))[2]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000001.ckpt").touch()
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = ended(capsys, "generate", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: standard input: empty")

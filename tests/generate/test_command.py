"""`hybridlm generate`: what it prints, what it keeps, and how mistakes end."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.cli.verbs import run_app
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.files.checksum import closing_line
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.runs.checkpoint import FORMAT_VERSION, KEY, load_run
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run

GREEDY = ["--temperature", "0", "-n", "12"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("run") / "a")
    run(compose_config([*tiny, "trainer.max_steps=4"]), folder, None)
    return folder


@pytest.fixture
def said(capsys, monkeypatch):
    """Runs the command in this process; returns exit code, standard output and standard error."""

    def call(*arguments: object, stdin: str | bytes | None = None) -> tuple[int, str, str]:
        data = b"" if stdin is None else stdin.encode() if isinstance(stdin, str) else stdin
        given = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
        given.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", given)
        try:
            run_app([str(word) for word in arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_three_ways_to_give_a_prompt_are_one(folder, said, tmp_path):
    text = "def f1(x):\n"
    (tmp_path / "prompt.txt").write_text(text)
    by_option = said("generate", folder.path, "--prompt", text, *GREEDY)
    assert by_option == said("generate", folder.path, "--file", tmp_path / "prompt.txt", *GREEDY)
    assert by_option == said("generate", folder.path, *GREEDY, stdin=text)
    loaded = load_run(str(folder.path), torch.device("cpu"))
    sampling = Sampling(temperature=0, max_new_tokens=12, stop_ids=(loaded.tokenizer.eos_id,))
    (want,) = Engine(loaded.model, loaded.tokenizer).generate([loaded.tokenizer.encode(text)], sampling)
    assert by_option == (0, text + want.text + "\n", "")


def test_samples_as_json_and_as_text(folder, said):
    arguments = ("generate", folder.path, "-p", "def ", "-p", "x", "--n-samples", 2, "-n", 9, "--seed", 3)
    code, out, _ = said(*arguments, "--json", "--logprobs", 2)
    objects = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(one["prompt"], one["sample"], one["seed"]) for one in objects] == [
        ("def ", 0, 3),
        ("def ", 1, 4),
        ("x", 0, 5),
        ("x", 1, 6),
    ]
    for one in objects:
        assert one["finish"] in ("length", "stop")
        assert [entry["id"] for entry in one["logprobs"]] == one["ids"]
        assert all(
            len(entry["top"]) == 2 and entry["top"][0]["logprob"] >= entry["logprob"] for entry in one["logprobs"]
        )
    code, out, _ = said(*arguments)
    assert out == "\n\n----------------\n\n".join(one["prompt"] + one["text"] for one in objects) + "\n"
    alone = json.loads(said("generate", folder.path, "-p", "x", "-n", 9, "--seed", 6, "--json")[1])
    assert alone["ids"] == objects[3]["ids"]


def test_every_option_reaches_the_sampling(folder, said):
    """Each changes what is written."""

    def text(*options: object) -> str:
        code, out, _ = said(
            "generate", folder.path, "-p", "def f", "-n", 60, "--temperature", 2, "--top-p", 1, *options
        )
        assert code == 0
        return out

    base = text()
    assert base == text()
    options = [
        "--top-k 3",
        "--top-p 0.1",
        "--min-p 0.9",
        "--repetition-penalty 40",
        "--presence-penalty 30",
        "--frequency-penalty 30",
    ]
    options += ["--logit-bias 97=90", "--seed 1", "--temperature 0.1", "-n 10"]
    for option in options:
        assert text(*option.split()) != base, option
    assert text("--logit-bias", "97=90") == "def f" + "a" * 60 + "\n"
    assert text("--logit-bias", "97=90", "--stop", "aaa") == "def f\n"


def test_a_text_goes_on_from_its_state(folder, said, tmp_path):
    arguments = ["--temperature", "1.5", "--seed", "7"]
    whole = said("generate", folder.path, "-p", "def f", "-n", 30, *arguments)[1]
    first = said("generate", folder.path, "-p", "def f", "-n", 10, *arguments, "--save-state", tmp_path / "s")[1]
    rest = said("generate", folder.path, "-n", 20, *arguments, "--load-state", tmp_path / "s")[1]
    assert whole.startswith(first.rstrip("\n\ufffd"))
    assert whole.rstrip("\n").endswith(rest.strip("\n\ufffd"))
    ways = (["--load-state", tmp_path / "s"], ["-p", "def f", "-n", 30])
    ids = [json.loads(said("generate", folder.path, "-n", 20, *arguments, "--json", *way)[1])["ids"] for way in ways]
    assert ids[0] == ids[1][10:]
    branches = said(
        "generate", folder.path, "-n", 20, *arguments, "--json", "--load-state", tmp_path / "s", "--n-samples", 3
    )[1]
    assert json.loads(branches.splitlines()[0])["ids"] == ids[0]
    assert len({tuple(json.loads(line)["ids"]) for line in branches.splitlines()}) == 3


def test_a_text_longer_than_those_of_training_is_noted(folder, said):
    assert said("generate", folder.path, "-p", "def ", "-n", 28)[2] == ""
    assert "32" in said("generate", folder.path, "-p", "def ", "-n", 29)[2]
    assert said("generate", folder.path, "-p", "def ", "-n", 29, "--context", 20)[::2] == (0, "")


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["FOLDER"], None, "--prompt TEXT"),
        (["FOLDER"], "", "standard input: "),
        (["FOLDER"], b"\xff\xfe", "standard input: not UTF-8 text (byte 0)"),
        (["FOLDER", "-p", ""], None, "--prompt: "),
        (["FOLDER", "-p", "a", "-p", ""], None, "--prompt: "),
        (["FOLDER", "--file", "nowhere.txt"], None, "--file nowhere.txt: "),
        (["FOLDER", "--file", "nowhere.txt", "-p", "a"], None, "--file"),
        (["nowhere", "-p", "a"], None, "nowhere: "),
        (["nowhere"], "", "nowhere: "),
        (["FOLDER", "-p", "a" * 50, "--context", "50"], None, "prompt: 50 tokens"),
        (["FOLDER", "-p", "a", "--context", "1"], None, "--context"),
        (["FOLDER", "-p", "a", "-n", "0"], None, "max_new_tokens = 0: "),
        (["FOLDER", "-p", "a", "--n-samples", "0"], None, "--n-samples"),
        (["FOLDER", "-p", "a", "--temperature", "-1"], None, "temperature = -1.0: "),
        (["FOLDER", "-p", "a", "--stop", ""], None, "stop = ('',)"),
        (["FOLDER", "-p", "a", "--logprobs", "2"], None, "--logprobs: "),
        (["FOLDER", "-p", "a", "--logit-bias", "a"], None, "logit_bias 'a': "),
        (["FOLDER", "-p", "a", "--logit-bias", "300=1"], None, "logit_bias: id 300"),
        (["FOLDER", "-p", "a", "--ema"], None, "callbacks=ema"),
        (["FOLDER", "-p", "a", "--load-state", "nowhere"], None, "nowhere: "),
        (["FOLDER", "-p", "a", "-p", "b", "--load-state", "x"], None, "--load-state: "),
        (["FOLDER", "-p", "a", "--n-samples", "2", "--save-state", "x"], None, "--save-state: "),
        (
            ["FOLDER", "-p", "a", "-n", "2", "--save-state", "nowhere/x"],
            None,
            "--save-state nowhere/x: ",
        ),
        (["FOLDER", "-p", "a", "-n", "2", "--save-state", "."], None, "--save-state .: "),
        (["FOLDER", "-p", "a", "--temperature", "nan"], None, "temperature = nan: "),
        (
            ["FOLDER", "-p", "a", "--logit-bias", "5=1e39"],
            None,
            "logit_bias = {5: 1e+39}: ",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, said, arguments, stdin, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = said("generate", *[folder.path if word == "FOLDER" else word for word in arguments], stdin=stdin)
    assert out == "", "a mistake is reported before anything is printed"
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert (code, len(errors)) == (2, 1), err
    assert says in errors[0]


def test_a_checkpoint_that_does_not_fit_is_one_line(folder, said, tmp_path):
    """Of another format version; beside another tokenizer."""
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(folder.path, copy.path)
    text = copy.tokenizer.read_text()
    byte_tokenizer(["<|another|>"]).save(copy.tokenizer)
    code, _, err = said("generate", copy.path, "-p", "a")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "not the tokenizer of" in err
    copy.tokenizer.write_text(text)

    newest = copy.newest_checkpoint()
    content = torch.load(newest, weights_only=True)
    content[KEY]["format_version"] = 99
    torch.save(content, newest)
    with open(newest, "ab") as file:
        file.write(closing_line(hashlib.sha256(newest.read_bytes()).hexdigest()))
    code, _, err = said("generate", newest, "-p", "a")
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"format version 99, this program reads {FORMAT_VERSION}" in err


@pytest.mark.skipif(os.name != "posix", reason="a pipe of POSIX")
def test_a_closed_pipe_is_no_error(folder, environment):
    line = [sys.executable, "-m", "hybridlm", "generate", str(folder.path), "-p", "def ", "-n", "3000"]
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(2)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 0
    assert "Traceback" not in err
    assert "Exception" not in err


def test_what_a_model_writes_cannot_act_on_a_terminal(folder, said, monkeypatch):
    """Into a pipe it is the text itself."""
    prompt = "a\x1b[2J\x07\r\n\tb\x9b\u202e☃"
    ask = ("generate", folder.path, "--prompt", prompt, *GREEDY)
    assert said(*ask)[1].startswith(prompt)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for more in ((), ("--n-samples", "2")):
        out = said(*ask, *more)[1]
        assert out.startswith("a\\x1b[2J\\x07\\r\n\tb\\x9b\\u202e☃")
        assert not any(letter in out for letter in "\x1b\x07\r\x9b\u202e")

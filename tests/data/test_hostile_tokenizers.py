"""Tokenizers that a stranger made: refused in a line, or ones that give texts back. None runs code, and none takes much
time or memory."""

from __future__ import annotations

import base64
import copy
import json
import os
import random

import pytest
from hostile import VALUES, mutated, refused_or_read
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as LibraryTokenizer

from hybridlm.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, symbol_tokenizer, train_bpe
from hybridlm.data.tokenizer.foreign import library_of
from hybridlm.errors import UserError

TEXT = "def f(x):\n    return 'naïve' + \"☃ 你好\"  # 1234\n"
REGEXES = [
    "(",
    "(a|aa)+$",
    "(a*)*b",
    "(?:x+x+)+y",
    "(?<n>a)\\g<n>*$",
    "\\p{Nope}",
    "a{99999999}",
    "(?=(a+))\\1b",
    "[[:alpha:]",
    "",
]


def facts_of(tokenizer: Tokenizer) -> dict[str, object]:
    return json.loads(tokenizer._library.to_str())


VALID = [
    facts_of(train_bpe([TEXT] * 3, 300)),
    facts_of(byte_tokenizer(["<|user|>", "<|end|>"])),
    facts_of(symbol_tokenizer(["<|endoftext|>", "a", "b"])),
]


def use(path, load) -> None:
    tokenizer = load(path)
    if tokenizer.lossless:
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    tokenizer.token_bytes()
    assert len(tokenizer.fingerprint) == 64


def strange(generator: random.Random) -> object:
    regex = {"type": "Split", "pattern": {"Regex": generator.choice(REGEXES)}, "behavior": "Isolated", "invert": False}
    steps = [
        regex,
        {
            "type": "Sequence",
            "pretokenizers": [regex, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
        },
        {"type": "FixedLength", "length": 0},
        {"type": "Replace", "pattern": {"Regex": generator.choice(REGEXES)}, "content": "x"},
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(range(40))).decode()},
    ]
    return copy.deepcopy(generator.choice([*VALUES, *steps]))


@pytest.mark.parametrize(
    "seed", [pytest.param(range(150), id="150"), pytest.param(range(150, 5000), id="4850", marks=pytest.mark.slow)]
)
def test_a_mutated_tokenizer_is_refused_in_a_line_or_keeps_texts(tmp_path, seed, capfd):
    path = tmp_path / "tokenizer.json"
    for valid in VALID:
        path.write_text(json.dumps(valid), encoding="utf-8")
        use(path, Tokenizer.load)
    for number in seed:
        generator = random.Random(number)
        changed = copy.deepcopy(generator.choice(VALID))
        if generator.random() < 0.7:
            part = generator.choice(
                ["normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens", "padding", "truncation"]
            )
            changed[part] = (
                strange(generator)
                if not changed[part] or generator.random() < 0.5
                else mutated(changed[part], generator, strange)
            )
        else:
            changed = mutated(changed, generator, strange)
        path.write_text(json.dumps(changed), encoding="utf-8")
        for load in (Tokenizer.load, load_tokenizer):
            refused_or_read(lambda load=load: use(path, load))
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_that_never_ends_is_refused_at_once(tmp_path, regex, capfd):
    path = tmp_path / "tokenizer.json"
    facts = copy.deepcopy(VALID[0])
    facts["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": regex}
    path.write_text(json.dumps(facts), encoding="utf-8")
    for load in (Tokenizer.load, load_tokenizer):
        refused_or_read(lambda load=load: use(path, load))
    assert capfd.readouterr().err == ""


def test_a_panic_on_a_text_is_a_one_line_error():
    tokenizer = byte_tokenizer()
    library = LibraryTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    facts = json.loads(library.to_str()) | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
    tokenizer._library = LibraryTokenizer.from_str(json.dumps(facts))
    with pytest.raises(UserError, match="the tokenizer fails on a text"):
        tokenizer.encode(TEXT)


@pytest.mark.parametrize("token", [2**20, 10**9, 2**31, 2**32 - 1, 2**32, 2**64, -1, 1.5, "1", None, [1]])
def test_an_id_takes_no_memory(tmp_path, token):
    path = tmp_path / "tokenizer.json"
    for where in ("vocab", "added", "folder"):
        facts = copy.deepcopy(VALID[1])
        if where == "added":
            facts["added_tokens"].append(facts["added_tokens"][0] | {"id": token, "content": "<|x|>"})
        else:
            facts["model"]["vocab"]["zz"] = token
        path.write_text(json.dumps(facts), encoding="utf-8")
        if where == "folder":
            (tmp_path / "folder").mkdir(exist_ok=True)
            (tmp_path / "folder/vocab.json").write_text(
                json.dumps(facts["model"]["vocab"] | {"<|endoftext|>": 256}), encoding="utf-8"
            )
            (tmp_path / "folder/merges.txt").write_text("#version: 0.2\nz z\n", encoding="utf-8")
            assert not refused_or_read(lambda: use(tmp_path / "folder", load_tokenizer))
        for load in (Tokenizer.load, load_tokenizer):
            assert not refused_or_read(lambda load=load: use(path, load))


def test_files_that_are_no_tokenizers(tmp_path):
    path = tmp_path / "tokenizer.json"
    many = copy.deepcopy(VALID[1])
    many["added_tokens"] = [many["added_tokens"][0] | {"id": 300 + i, "content": f"<{i}>"} for i in range(70_000)]
    for text in (
        "[" * 10**6,
        "{}",
        "[]",
        "null",
        "9" * 10**6,
        '"\\ud800"',
        json.dumps(many),
        '{"model": {"vocab": {"a": NaN}}}',
    ):
        path.write_text(text, encoding="utf-8")
        for load in (Tokenizer.load, load_tokenizer):
            assert not refused_or_read(lambda load=load: load(path))
    path.write_bytes(b"\xff\xfe{}")
    assert not refused_or_read(lambda: Tokenizer.load(path))
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse
    assert not refused_or_read(lambda: Tokenizer.load(path))
    for name in ("tokenizer.json", "gpt2.tiktoken", "merges.txt"):
        pipe = tmp_path / name
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
        where = tmp_path if name == "merges.txt" else pipe
        if name == "merges.txt":
            (tmp_path / "tokenizer.json").unlink()
        assert not refused_or_read(lambda where=where: load_tokenizer(where))


def test_a_folder_never_runs_code_and_its_template_is_not_rendered(tmp_path, monkeypatch):
    """No program of a tokenizer's folder is imported, and conversations are written by our own templates, whatever
    Jinja lies there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "stranger"
    folder.mkdir()
    byte_tokenizer(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]).save(folder / "tokenizer.json")
    evil = (
        "{{ ().__class__.__bases__[0].__subclasses__() }}{{ 'x' * 10**9 }}{% for i in range(10**9) %}{{ i }}{%"
        " endfor %}"
    )
    (folder / "chat_template.jinja").write_text(evil, encoding="utf-8")
    (folder / "evil.py").write_text("open('pwned', 'w')", encoding="utf-8")
    config = {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
        "chat_template": evil,
        "trust_remote_code": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    from hybridlm.data.chat import template_of

    def convert() -> None:
        tokenizer = load_tokenizer(folder)
        template = template_of(tokenizer)
        assert "__class__" not in template.jinja()

    assert refused_or_read(convert)
    assert os.listdir(tmp_path) == ["stranger"]


def test_token_names_are_escaped_on_terminals(tmp_path):
    library = LibraryTokenizer.from_str(json.dumps(VALID[1]))
    library.add_special_tokens([AddedToken("\x1b[2J<|x|>", special=True, normalized=False)])
    facts = json.loads(library.to_str())
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] != "<|endoftext|>"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(facts), encoding="utf-8")
    for load in (Tokenizer.load, load_tokenizer):
        assert not refused_or_read(lambda load=load: load(path))
    with pytest.raises(UserError):
        library_of({"model": {"vocab": {"\x1b": "x"}}}, path)

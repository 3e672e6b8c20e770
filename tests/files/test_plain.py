"""Plain values out of JSON and YAML that a stranger wrote: what is refused, in a few words, and that refusing takes no
time."""

from __future__ import annotations

import json
import os
import random
import time
from contextlib import suppress

import pytest
import yaml

from hybridlm.files.plain import MAX_DEPTH, Unreadable, parse_json, parse_yaml, read_json, read_text, read_yaml

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "alias"),
        ("a: &a [*a]", "alias"),
        ("[" * 1_000_000, "not YAML"),
        ("- " * 100_000, "levels deep"),
        ("{a: " * 100 + "1" + "}" * 100, "levels deep"),
        (f"a: {'9' * 5_000}", "digits"),
        (f"a: 0x{'f' * 1_000_000}", "digits"),
        (f"a: 1{':59' * 100_000}", "digits"),
        ("a: !!python/object/apply:os.system [id]", "tag"),
        ("a: !other 1", "tag"),
        ("a: [1", "not YAML"),
        ("{[1, 2]: 3}", "not YAML"),
        ("a: \0", "not YAML"),
    ],
)
def test_yaml_that_would_cost_or_run_something_is_refused_at_once(text, reason):
    began = time.perf_counter()
    with pytest.raises(Unreadable, match=reason):
        parse_yaml(text)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 1_000_000, "levels deep"),
        ("[" * 500 + "]" * 500, "levels deep"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "levels deep"),
        ("9" * 5_000, "digits"),
        ("{", "not JSON"),
        (b"\xff", "not JSON"),
    ],
)
def test_json_likewise(text, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_json(text)


def test_a_key_twice_is_refused_where_it_matters():
    text = '{"a": {"x": 1, "\\u0078": 2}}'
    assert parse_json(text) == {"a": {"x": 2}}
    with pytest.raises(Unreadable, match="'x' twice"):
        parse_json(text, unique=True)


def test_plain_values_are_read_and_dates_stay_texts():
    tree = {"a": [1, 2.5, None, True, "x: y"], "b": {"c": "2020-01-01", "d": float("inf")}}
    assert parse_yaml(yaml.safe_dump(tree)) == tree
    assert parse_yaml("day: 2020-01-01") == {"day": "2020-01-01"}
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest) == parse_yaml(deepest)


def test_only_a_small_regular_file_of_text_is_read(tmp_path):
    (tmp_path / "good").write_text('{"a": 1}', encoding="utf-8")
    (tmp_path / "latin").write_bytes(b'"\xe9"')
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)  # sparse
    os.mkfifo(tmp_path / "pipe")
    assert read_json(tmp_path / "good") == read_yaml(tmp_path / "good") == {"a": 1}
    for name, reason in (
        ("latin", "UTF-8"),
        ("huge", "larger"),
        ("pipe", "regular"),
        ("gone", "No such file"),
        (".", "read|regular"),
    ):
        with pytest.raises(Unreadable, match=reason):
            read_text(tmp_path / name)


PIECES = [
    "a", "- ", ": ", "\n", "  ", "{", "}", "[", "]", ",", "&a", "*a", "!!str", "!", "|", ">", "#", "'", '"', "\\",
    "%YAML 1.1", "---",
    "...", "? ", "<<", "0x1f", "1:30", "1e400", "9" * 400, "2020-01-01", "~", "null", "true", ".inf", "\t", "\0",
    "\x85", "\ufeff",
    "\ud800", "☃", "!!python/object/apply:os.system [touch pwned]", "!!binary x", "__class__", "_target_: os.system",
    "${oc.env:HOME}",
]  # fmt: skip


def plain(value: object) -> bool:
    if type(value) is dict:
        return all(plain(key) and plain(item) for key, item in value.items())
    return all(map(plain, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))


@pytest.mark.parametrize(
    "seed",
    [pytest.param(range(3_000), id="3000"), pytest.param(range(3_000, 60_000), id="57000", marks=pytest.mark.slow)],
)
def test_any_text_gives_plain_values_or_a_reason(seed, tmp_path, monkeypatch):
    """YAML and JSON made of their own signs, and valid texts with some of them put in."""
    monkeypatch.chdir(tmp_path)
    valid = yaml.safe_dump({"a": [1, 2.5, None, True, "x: y"], "b": {"c": "2020-01-01", "d": [{"e": ""}]}})
    for number in seed:
        generator = random.Random(number)
        if generator.random() < 0.5:
            text = "".join(generator.choice(PIECES) for _ in range(generator.randint(1, 40)))
        else:
            text = generator.choice([valid, json.dumps(yaml.safe_load(valid))])
            for _ in range(generator.randint(1, 4)):
                place = generator.randrange(len(text))
                text = text[:place] + generator.choice(PIECES) + text[place + generator.randint(0, 3) :]
        for parse in (parse_yaml, parse_json):
            began = time.perf_counter()
            with suppress(Unreadable):
                assert plain(parse(text)), text
            assert time.perf_counter() - began < 5
    assert os.listdir(tmp_path) == []

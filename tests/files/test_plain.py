"""Plain values out of JSON and YAML that a stranger wrote: what is refused, in a few words, and that refusing takes no time."""

from __future__ import annotations

import os
import time

import pytest
import yaml

from hybridlm.files.plain import MAX_DEPTH, Unreadable, parse_json, parse_yaml, read_json, read_text, read_yaml

BOMB = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20))


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
    for name, reason in (("latin", "UTF-8"), ("huge", "larger"), ("pipe", "regular"), ("gone", "No such file"), (".", "read|regular")):
        with pytest.raises(Unreadable, match=reason):
            read_text(tmp_path / name)

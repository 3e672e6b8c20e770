"""What each kind of file gives, and one line for everything in it that cannot be a document."""

from __future__ import annotations

import gzip
import json
import logging

import pyarrow
import pytest
from pyarrow import parquet

from hybridlm.config.data import DataConfig
from hybridlm.config.section import ConfigError
from hybridlm.data.readers import Bad, Document, read
from hybridlm.data.sources import documents, is_validation, split

LINES = [
    b'{"text": "one"}\n',
    b"\n",  # blank lines are no documents, and count as lines
    b'{"text": "tw\xc3\xb6", "id": 2}\r\n',
    b'{"text": "br\xff"}\n',
    b'{"text": "cut off\n',
    b'["text"]\n',
    b'{"body": "x", "id": 3}\n',
    b"{}\n",
    b'{"text": 5}\n',
    b'{"text": null}\n',
    b'{"text": ""}\n',
    b'{"text": "\\ud800"}\n',
    b"[" * 100_000 + b"\n",
    b'{"text": "last, without a line end"}',
]
BAD = [
    "a.jsonl:4: not UTF-8 (byte 12: invalid start byte)",
    "a.jsonl:5: not JSON (Unterminated string starting at, column 10)",
    "a.jsonl:6: not a JSON object (list)",
    "a.jsonl:7: no field 'text' (it has body, id)",
    "a.jsonl:8: no field 'text' (it has none)",
    "a.jsonl:9: 'text' is not text (int)",
    "a.jsonl:10: 'text' is not text (null)",
    "a.jsonl:11: empty",
    "a.jsonl:12: 'text' is not text (half a surrogate pair)",
    "a.jsonl:13: not JSON (nested too deep)",
]
GOOD = [("a.jsonl:1", "one"), ("a.jsonl:3", "twö"), ("a.jsonl:14", "last, without a line end")]


def found(path, name="a.jsonl", text_field="text"):
    both = list(read(name, path, text_field))
    good = [(document.name, document.text) for document in both if isinstance(document, Document)]
    return good, [str(bad) for bad in both if isinstance(bad, Bad)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte_order_mark"])
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".jsonl.gz", ".JSONL"])
def test_lines(tmp_path, ending, mark):
    path, data = tmp_path / f"a{ending}", mark + b"".join(LINES)
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    assert found(path) == (GOOD, BAD)


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(LINES))
    assert found(tmp_path / "a.jsonl", text_field="body")[0] == [("a.jsonl:7", "x")]


def test_damaged_compression_keeps_what_came_before(tmp_path):
    whole = gzip.compress(b"".join(json.dumps({"text": f"{i} " * 50}).encode() + b"\n" for i in range(2000)), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    for data, what in ((whole[: len(whole) // 2], "compressed data are damaged"), (b"not gzip", "cannot be read")):
        path.write_bytes(data)
        good, bad = found(path)
        assert len(bad) == 1
        assert what in bad[0]
        assert all(text == f"{i} " * 50 for i, (_, text) in enumerate(good))
    path.write_bytes(whole[:200] + b"\x00" * 50 + whole[250:])
    assert len(found(path)[1]) == 1


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = ["one", None, "", "zwö"] + ["more"] * 3000
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=500)
    good, bad = found(path, "a.parquet")
    assert good[:3] == [("a.parquet:1", "one"), ("a.parquet:4", "zwö"), ("a.parquet:5", "more")]
    assert len(good) == 3002
    assert bad == ["a.parquet:2: 'text' is not text (null)", "a.parquet:3: empty"]
    assert found(path, "a.parquet", "body") == ([], ["a.parquet: no column 'body' (it has id, text)"])
    assert found(path, "a.parquet", "id")[1][0] == "a.parquet:1: 'id' is not text (int)"
    path.write_bytes(path.read_bytes()[:-30])
    (line,) = found(path, "a.parquet")[1]
    assert line.startswith("a.parquet: not readable as Parquet")
    assert "\n" not in line


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (line,) = found(tmp_path / name, name)[1]
    assert line == f"{name}: empty" or line.startswith(f"{name}: not readable as Parquet")


def test_what_is_skipped_is_counted_by_kind(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(b"".join(LINES))
    (tmp_path / "b.txt").write_bytes(b"fine")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    config = DataConfig(source="files", path=f"{tmp_path}/*")
    with caplog.at_level(logging.WARNING):
        assert [document.name for document in documents(config)] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:14", "b.txt"]
    (line,) = caplog.messages
    assert "11 of 15 documents left out" in line
    assert "3 x 'text' is not text (first a.jsonl:9, int)" in line
    assert "2 x not UTF-8 (first a.jsonl:4, byte 12: invalid start byte)" in line
    with pytest.raises(ConfigError, match=r"a\.jsonl:4: not UTF-8 .*data\.on_bad=skip"):
        list(documents(config.model_copy(update={"on_bad": "fail"})))


def test_a_field_that_no_line_has_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(
        ConfigError, match=r"none of its 3 document\(s\) can be used; the first: a\.jsonl:1: no field 'text' \(it has body\)"
    ):
        list(documents(DataConfig(source="files", path=f"{tmp_path}/*.jsonl")))


def test_lines_keep_their_side_when_others_come_and_go(tmp_path):
    """And equal texts are never on both."""
    texts = [f"text {i % 150}" for i in range(300)]

    def held_out(texts):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train, val = split(list(documents(DataConfig(source="files", path=f"{tmp_path}/a.jsonl"))), 0.2)
        return {document.text for document in train}, {document.text for document in val}

    train, val = held_out(texts)
    assert not train & val
    assert 15 < len(val) < 50
    assert held_out([f"new {i}" for i in range(40)] + texts)[1] >= val


def test_a_file_is_held_out_by_its_name():
    assert Document("os.py", "x").key == "os.py"
    assert is_validation("os.py", 0.86)

"""What each kind of file gives, and one line for everything in it that cannot be a document."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from hybridlm.data.reading import documents, readers
from hybridlm.data.reading.documents import Bad, Document, TextRecords
from hybridlm.data.reading.file_units import SourceFile
from hybridlm.data.reading.scan import scan_files

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
    b'{"text": ' + b"9" * 5000 + b"}\n",
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
GOOD = [("a.jsonl:1", "one"), ("a.jsonl:3", "twö"), ("a.jsonl:15", "last, without a line end")]


def found(path, name="a.jsonl", text_field="text", unit_bytes=1 << 20):
    """(name, text) of the documents, and the lines of what is bad."""
    corpus = scan_files([SourceFile(name, path)], TextRecords(text_field), unit_bytes, Path(os.devnull, "kept"))
    both = [document for unit in corpus.units for document in unit.documents()]
    good = [(document.name, document.text) for document in both if isinstance(document, Document)]
    return good, [str(bad) for bad in both if isinstance(bad, Bad)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte_order_mark"])
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".jsonl.gz", ".JSONL"])
def test_lines(tmp_path, ending, mark):
    path, data = tmp_path / f"a{ending}", mark + b"".join(LINES)
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    good, bad = found(path)
    assert good == GOOD
    assert bad[:-1] == BAD
    assert bad[-1].startswith("a.jsonl:14: not JSON (Exceeds the limit")


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(LINES))
    assert found(tmp_path / "a.jsonl", text_field="body")[0] == [("a.jsonl:7", "x")]


def test_what_is_bad_is_one_short_line_whatever_the_fields_are_called(tmp_path):
    names = ["a\nb", "\x1b[31m", "\ud800", "é", *(f"field {i}" for i in range(1000))]
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(names, 1)))
    (line,) = found(tmp_path / "a.jsonl")[1]
    assert line.startswith(r"a.jsonl:1: no field 'text' (it has a\nb, \x1b[31m, \ud800, é, field 0, ")
    assert line.isprintable()
    assert len(line) < 300


def test_compressed_data_cut_off_anywhere_keep_what_came_before(tmp_path):
    texts = [f"{i} " * 50 for i in range(30)]
    whole = gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts), mtime=0)
    path, before = tmp_path / "a.jsonl.gz", 0
    for end in [*range(20), *range(20, len(whole), 13), *range(len(whole) - 9, len(whole))]:
        path.write_bytes(whole[:end])
        good, bad = found(path)
        assert [text for _, text in good] == texts[: len(good)]
        assert len(good) >= before
        if end:
            (line,) = bad
            assert line.startswith(f"a.jsonl:{len(good) + 1}: compressed data are damaged (")
        else:
            assert bad == ["a.jsonl: empty"]
        before = len(good)
    assert before == 30
    path.write_bytes(whole)
    assert [text for _, text in found(path)[0]] == texts


@pytest.mark.parametrize("damage", ["no_gzip", "zeros", "check", "rubbish_behind"])
def test_damaged_compression_is_one_bad_line(tmp_path, damage):
    whole = gzip.compress(b"".join(json.dumps({"text": f"{i} " * 50}).encode() + b"\n" for i in range(2000)), mtime=0)
    data = {
        "no_gzip": b"not gzip",
        "zeros": whole[:200] + b"\x00" * 50 + whole[250:],
        "check": whole[:-8] + b"\x00" * 4 + whole[-4:],
        "rubbish_behind": whole + b"rubbish",
    }[damage]
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    good, bad = found(tmp_path / "a.jsonl.gz")
    (line,) = bad
    assert "compressed data are damaged" in line
    assert all(text == f"{i} " * 50 for i, (_, text) in enumerate(good))
    assert (len(good) == 2000) == (damage in ("check", "rubbish_behind"))


def test_a_zipped_file_of_empty_lines_holds_no_document(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n\n\r\n"))
    assert found(tmp_path / "a.jsonl.gz") == ([], [])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    assert found(tmp_path / "a.jsonl.gz") == ([], ["a.jsonl: empty"])


@pytest.mark.parametrize("unit_bytes", [1, 3000, 1 << 20])
def test_parquet(tmp_path, unit_bytes):
    path = tmp_path / "a.parquet"
    texts = ["one", None, "", "zwö"] + ["more"] * 3000
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=500)
    good, bad = found(path, "a.parquet", unit_bytes=unit_bytes)
    assert good == [(f"a.parquet:{row}", text) for row, text in enumerate(texts, 1) if text]
    assert bad == ["a.parquet:2: 'text' is not text (null)", "a.parquet:3: empty"]
    assert found(path, "a.parquet", "body", unit_bytes) == ([], ["a.parquet: no column 'body' (it has id, text)"])
    assert found(path, "a.parquet", "id", unit_bytes)[1][0] == "a.parquet:1: 'id' is not text (int)"


def test_parquet_holds_text_in_many_ways(tmp_path):
    texts = ["a", "b", None, "a"]
    columns = [pyarrow.array(texts, kind) for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())]
    columns += [pyarrow.array(texts).dictionary_encode(), pyarrow.array([text and text.encode() for text in texts])]
    parquet.write_table(
        pyarrow.table(columns, names=["small", "large", "view", "dictionary", "binary"]), tmp_path / "a.parquet"
    )
    expected = [("x:1", "a"), ("x:2", "b"), ("x:4", "a")], ["x:3: 'FIELD' is not text (null)"]
    for field in ("small", "large", "view", "dictionary"):
        good, (bad,) = found(tmp_path / "a.parquet", "x", field)
        assert (good, [bad.replace(field, "FIELD")]) == expected
    assert found(tmp_path / "a.parquet", "x", "binary")[1][:2] == [
        f"x:{row}: 'binary' is not text (bytes)" for row in (1, 2)
    ]


def test_a_row_of_parquet_that_is_not_utf8_is_bad_alone(tmp_path):
    ends, data = (
        pyarrow.py_buffer(part) for part in (b"".join(end.to_bytes(4, "little") for end in range(4)), b"a\xffb")
    )
    parquet.write_table(
        pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.utf8(), 3, [None, ends, data])}),
        tmp_path / "a.parquet",
    )
    good, (bad,) = found(tmp_path / "a.parquet", "x")
    assert good == [("x:1", "a"), ("x:3", "b")]
    assert bad.startswith("x:2: cannot be decoded ('utf-8' codec can't decode byte 0xff")


def test_long_rows_of_parquet_are_held_a_few_at_a_time(tmp_path, monkeypatch):
    texts = [f"{i}" * 500_000 for i in range(10, 40)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    held = []
    monkeypatch.setattr(
        readers,
        "_documents",
        lambda name, row, batch, records, real=readers._documents: (
            held.append(batch.num_rows),
            real(name, row, batch, records),
        )[1],
    )
    assert [text for _, text in found(tmp_path / "a.parquet", "x")[0]] == texts
    assert max(held) <= 4


def test_parquet_of_no_rows_is_empty(tmp_path):
    schema = pyarrow.schema({"text": pyarrow.string()})
    parquet.write_table(schema.empty_table(), tmp_path / "a.parquet")
    assert found(tmp_path / "a.parquet", "x") == ([], ["x: empty"])
    with parquet.ParquetWriter(tmp_path / "b.parquet", schema):
        pass
    assert found(tmp_path / "b.parquet", "x") == ([], ["x: empty"])


def test_broken_parquet_is_one_line_wherever_it_is_broken(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["text"] * 100}), path)
    whole = path.read_bytes()
    broken = [whole[:end] for end in (0, 3, 12, len(whole) // 2, len(whole) - 30, len(whole) - 1)]
    broken += [whole[:-60] + b"\xff" * 40 + whole[-20:], whole[: len(whole) - 9] + whole[-8:]]
    broken += [whole[:4] + b"\xff" * 36 + whole[40:]]  # only seen when its rows are read
    for data in broken:
        path.write_bytes(data)
        good, (line,) = found(path, "a.parquet")
        assert not good
        assert line.startswith("a.parquet: not readable as Parquet (")
        assert line.isprintable()
        assert r"\n" not in line


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file_is_named_once(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (line,) = found(tmp_path / name, name)[1]
    assert line == (
        f"{name}: empty" if name != "a.parquet" else f"{name}: not readable as Parquet (Parquet file size is 0 bytes)"
    )


def test_a_text_keeps_its_line_ends_and_is_named_where_it_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\n")
    assert found(tmp_path / "a.txt", "a.txt") == ([("a.txt", "a\r\nb\rc\n\n")], [])
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert found(tmp_path / "a.txt", "a.txt") == ([], ["a.txt: not UTF-8 (byte 3: unexpected end of data)"])


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_a_file_name_that_is_not_utf8(tmp_path):
    folder = os.fsdecode(b"\xff")
    for ending, data in (
        (".jsonl", b'{"text": "x"}\n{'),
        (".txt", b"x"),
        (".jsonl.gz", gzip.compress(b'{"text": "x"}\n')),
    ):
        path = tmp_path / f"{folder}{ending}"
        path.write_bytes(data)
        assert [text for _, text in found(path, path.name)[0]] == ["x"]
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(path := tmp_path / f"{folder}.parquet")
    assert [text for _, text in found(path, path.name)[0]] == ["x"]
    (line,) = found(tmp_path / f"{folder}.jsonl", f"{folder}.jsonl")[1]
    assert line == r"\udcff.jsonl:2: not JSON (Expecting property name enclosed in double quotes, column 2)"


def test_a_record_that_is_too_long_is_left_out_and_those_around_it_are_read(tmp_path, monkeypatch):
    """Whatever the file is; of a line no more than the limit is held."""
    monkeypatch.setattr(documents, "LONGEST", 1000)
    lines = [json.dumps({"text": text}) for text in ("one", "x" * 5000, "two", "y" * 2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    table = pyarrow.table({"text": ["one", "x" * 5000, "two", "y" * 2000] + ["small"] * 30})
    parquet.write_table(table, tmp_path / "a.parquet")
    shared = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 1, 0, *[1] * 30]), pyarrow.array(["x" * 5000, "one"])
    )
    parquet.write_table(pyarrow.table({"text": shared}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["x" * 5000, "one"]}), tmp_path / "c.parquet")
    for name, rows in (
        ("a.jsonl", [1, 3]),
        ("a.jsonl.gz", [1, 3]),
        ("a.parquet", [1, 3, *range(5, 35)]),
        ("b.parquet", [2, *range(4, 34)]),
        ("c.parquet", []),
    ):
        good, bad = found(tmp_path / name, name)
        assert [where for where, _ in good] == [f"{name}:{row}" for row in rows]
        assert any("more than 16,000,000 bytes (5," in line for line in bad) or name == "c.parquet"
    assert found(tmp_path / "c.parquet", "c.parquet")[1] == [
        "c.parquet:1: more than 16,000,000 bytes (2 rows of 5,063 bytes together)"
    ]
    assert found(tmp_path / "a.jsonl", "a.jsonl")[1] == [
        "a.jsonl:2: more than 16,000,000 bytes (5,013 bytes)",
        "a.jsonl:4: more than 16,000,000 bytes (2,012 bytes)",
    ]

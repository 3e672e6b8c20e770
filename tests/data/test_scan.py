"""Where files are cut, and when what was found in them is looked for again."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hybridlm.data.keep import kept_json
from hybridlm.data.reading import documents, scan
from hybridlm.data.reading.documents import Bad, Document, TextRecords
from hybridlm.data.reading.file_units import Broken, FilePart, SourceFile, Together
from hybridlm.data.reading.scan import scan_files
from hybridlm.errors import UserError

RECORDS = TextRecords("text")
NOWHERE = Path(os.devnull, "kept")
OLD = 1_000_000_000  # seconds: a time of change long past


def write(folder, files, *, changed=OLD):
    """Files of a corpus, by name below ``folder``."""
    written = []
    for name, content in sorted(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if changed is not None:
            os.utime(path, (changed, changed))
        written.append(SourceFile(name, path))
    return written


def read(corpus):
    """(name, text) of a document, the line of what is bad."""
    both = [document for unit in corpus.units for document in unit.documents()]
    return [(document.name, document.text) if isinstance(document, Document) else str(document) for document in both]


@pytest.fixture
def opened(monkeypatch):
    """The names of the files whose content is read by a scan."""
    names = []
    monkeypatch.setattr(
        scan, "_scan", lambda file, *rest, real=scan._scan: (names.append(file.name), real(file, *rest))[1]
    )
    return names


line = st.one_of(
    st.just(b""), st.just(b" "), st.integers(0, 30).map(lambda n: b'{"text": "' + b"x" * (n + 1) + b'"}'), st.just(b"{")
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(line, max_size=12),
    ending=st.sampled_from([b"\n", b"\r\n"]),
    closed=st.booleans(),
    block=st.integers(1, 40),
)
def test_slices_of_lines_are_the_lines_of_the_whole_file(tmp_path, monkeypatch, lines, ending, closed, block):
    data = ending.join(lines) + (ending if closed else b"")
    files = write(tmp_path, {"a.jsonl": data})
    monkeypatch.setattr(scan, "_BLOCK", 1 << 22)
    whole = read(scan_files(files, RECORDS, 1 << 20, NOWHERE))
    expected = [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    assert [
        int(str(one[0] if isinstance(one, tuple) else one).split(":")[1]) for one in whole if one != "a.jsonl: empty"
    ] == expected
    monkeypatch.setattr(scan, "_BLOCK", block)
    for unit_bytes in {1, 2, 3, 7, 20, 50, max(len(data), 1), len(data) + 1}:
        corpus = scan_files(files, RECORDS, unit_bytes, NOWHERE)
        assert read(corpus) == whole
        assert all(isinstance(unit, FilePart) and unit.kind == "lines" for unit in corpus.units)
        assert [unit.begin for unit in corpus.units[1:]] == [unit.end for unit in corpus.units[:-1]]
        assert sum(unit.size for unit in corpus.units) == len(data)
        # No longer than it must be: without its last line a unit is shorter than was asked for.
        pieces = [data[unit.begin : unit.end].rstrip(b"\n") for unit in corpus.units]
        assert all(piece.rfind(b"\n") + 1 < unit_bytes for piece in pieces)


def test_the_hash_and_the_cuts_do_not_depend_on_the_blocks(tmp_path, monkeypatch):
    data = b"".join(b"%d\n" % i for i in range(100)) + b"no line end"
    (tmp_path / "a").write_bytes(data)
    found = set()
    for block in [*range(1, 30), len(data) - 1, len(data), len(data) + 1]:
        monkeypatch.setattr(scan, "_BLOCK", block)
        sizes = []
        with (tmp_path / "a").open("rb") as file:
            sha256, cuts = scan._read(file, 17, sizes.append)
        assert sum(sizes) == len(data)
        found.add((sha256, tuple(cuts)))
    ((sha256, cuts),) = found
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert [data[cut.begin : cut.end] for cut in cuts[:2]] == [
        b"0\n1\n2\n3\n4\n5\n6\n7\n8\n",
        b"9\n10\n11\n12\n13\n14\n",
    ]
    assert [cut.first for cut in cuts[:3]] == [1, 10, 16]


@pytest.mark.parametrize(("data", "expected"), [(b"", ["a.jsonl: empty"]), (b"\n" * 50, []), (b"\r\n" * 50, [])])
def test_a_file_without_a_record(tmp_path, data, expected):
    for unit_bytes in (1, 5, 1000):
        assert read(scan_files(write(tmp_path, {"a.jsonl": data}), RECORDS, unit_bytes, NOWHERE)) == expected


def test_a_text_too_long_for_a_document_is_cut_between_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 10)
    text = "é" * 30 + "\n" + "".join(f"{i} öä\n" for i in range(10)) + "ü" * 9
    corpus = scan_files(write(tmp_path, {"a.txt": text.encode(), "b.txt": b"short"}), RECORDS, 1000, tmp_path / "kept")
    found = read(corpus)
    assert [name for name, _ in found] == [f"a.txt#{i + 1}" for i in range(len(found) - 1)] + ["b.txt"]
    assert "".join(text for _, text in found[:-1]) == text
    assert [text for _, text in found[:7]] == [*["é" * 5] * 5, "é" * 5 + "\n", "0 öä\n1 öä\n"]
    assert max(unit.size for unit in corpus.units[:-1]) <= 2 * 10 + 3
    assert all(isinstance(unit, FilePart) for unit in corpus.units[:-1])
    assert read(scan_files(write(tmp_path, {"c.txt": b"\n\xe9" * 30}), RECORDS, 1000, tmp_path / "kept"))[1].startswith(
        "c.txt#2: not UTF-8"
    )


def test_short_texts_share_a_unit_in_the_order_of_their_names(tmp_path):
    contents = {f"{i}.txt": b"x" * 10 for i in range(7)} | {"3.jsonl": b'{"text": "x"}'}
    corpus = scan_files(write(tmp_path, contents), RECORDS, 20, tmp_path / "kept")
    assert [len(unit.units) if isinstance(unit, Together) else 1 for unit in corpus.units] == [2, 1, 1, 2, 2]
    assert [one[0].split(":")[0] for one in read(corpus)] == sorted(contents)
    assert [unit.size for unit in corpus.units] == [20, 10, 13, 20, 20]


def test_units_of_parquet_are_row_groups(tmp_path):
    parquet.write_table(pyarrow.table({"text": [f"{i}" for i in range(50)]}), tmp_path / "a.parquet", row_group_size=7)
    for unit_bytes, units in ((1, 8), (1 << 20, 1)):
        corpus = scan_files([SourceFile("a.parquet", tmp_path / "a.parquet")], RECORDS, unit_bytes, NOWHERE)
        assert len(corpus.units) == units
        assert read(corpus) == [(f"a.parquet:{i + 1}", f"{i}") for i in range(50)]
        assert all(unit.size > 0 for unit in corpus.units)


def test_what_has_not_changed_is_not_read_again(tmp_path, opened):
    contents = {
        "a.jsonl": b'{"text": "x"}\n' * 9,
        "b.txt": b"b",
        "c.jsonl.gz": gzip.compress(b'{"text": "z"}'),
        "d.parquet": b"bad",
    }
    contents |= {"e/\udcff.txt": b"e"} if os.name != "nt" else {}
    files, sizes = write(tmp_path, contents), []
    first = scan_files(files, RECORDS, 30, tmp_path / "kept" / "a.json", sizes.append)
    assert sorted(opened) == sorted(contents)
    assert sum(sizes) == sum(map(len, contents.values()))
    opened.clear()
    sizes.clear()
    second = scan_files(files, RECORDS, 30, tmp_path / "kept" / "a.json", sizes.append)
    assert (opened, sizes) == ([], [])
    assert second == first
    (tmp_path / "b.txt").write_bytes(b"c")
    assert scan_files(files, RECORDS, 30, tmp_path / "kept" / "a.json").fingerprint != first.fingerprint
    assert opened == ["b.txt"]


@pytest.mark.parametrize("content", [b"12345", b"1234"], ids=["time", "size"])
def test_a_file_of_another_size_or_time_is_read_again(tmp_path, opened, content):
    files = write(tmp_path, {"a.txt": b"1234"})
    before = scan_files(files, RECORDS, 30, tmp_path / "kept").fingerprint
    write(tmp_path, {"a.txt": content}, changed=OLD if len(content) == 5 else OLD + 1)
    after = scan_files(files, RECORDS, 30, tmp_path / "kept").fingerprint
    assert opened == ["a.txt"] * 2
    assert (before == after) == (content == b"1234")


def test_the_scan_of_a_file_that_has_just_changed_is_not_cached(tmp_path, opened):
    files = write(tmp_path, {"old.txt": b"1"}) + write(tmp_path, {"new.txt": b"2"}, changed=None)
    write(tmp_path, {"future.txt": b"3"}, changed=time.time() + 1000)
    files.append(SourceFile("future.txt", tmp_path / "future.txt"))
    for _ in range(2):
        scan_files(files, RECORDS, 30, tmp_path / "kept")
    assert sorted(opened) == ["future.txt", "future.txt", "new.txt", "new.txt", "old.txt"]
    assert set(kept_json(tmp_path / "kept")) == {"old.txt"}


def test_a_file_that_settles_while_others_are_read_is_not_kept(tmp_path, opened, monkeypatch):
    """Its time may be that of a second change after it was read."""
    files = write(tmp_path, {"a.txt": b"1"}, changed=None)
    began, calls = time.time_ns(), []
    monkeypatch.setattr(
        time, "time_ns", lambda: (calls.append(1), began if len(calls) == 1 and not opened else began + int(1e12))[1]
    )
    scan_files(files, RECORDS, 30, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_damaged_cached_scan_is_rebuilt(tmp_path, opened):
    files, kept = write(tmp_path, {"a.jsonl": b'{"text": "x"}\n' * 4}), tmp_path / "kept"
    first = scan_files(files, RECORDS, 20, kept)
    whole = kept.read_bytes()
    contents = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 3)]
    contents += [whole[:place] for place in range(0, len(whole), 7)]
    contents += [text.encode() for text in ("null", "[]", "5", '"x"', "\x00", "[" * 200_000, '{"facts": ' * 50_000)]
    contents += [b"\xff\xfe", b"9" * 5000, json.dumps(json.loads(whole)["facts"]).encode()]
    for number, content in enumerate(contents, 2):
        kept.write_bytes(content)
        assert scan_files(files, RECORDS, 20, kept) == first, content[:200]
        assert len(opened) == number, content[:200]
        assert kept.read_bytes() == whole
    opened.clear()
    assert scan_files(files, RECORDS, 20, kept) == first
    assert opened == []


@pytest.mark.parametrize("where", ["a_file_in_the_way", "a_folder_of_that_name"])
def test_without_a_writable_cache_every_scan_reads(tmp_path, opened, where):
    files = write(tmp_path, {"a.txt": b"1"})
    if where == "a_file_in_the_way":
        (tmp_path / "cache").write_bytes(b"")
    else:
        (tmp_path / "cache" / "kept").mkdir(parents=True)
    fingerprints = {scan_files(files, RECORDS, 20, tmp_path / "cache" / "kept").fingerprint for _ in range(2)}
    assert len(fingerprints) == 1
    assert opened == ["a.txt"] * 2
    assert (tmp_path / "cache").is_file() or [path.name for path in (tmp_path / "cache").iterdir()] == ["kept"]


def test_the_fingerprint_is_of_content_names_records_and_size_of_units(tmp_path):
    contents = {"a.jsonl": b'{"text": "x"}\n' * 9, "b.txt": b"b", "c.parquet": b"broken"}

    def fingerprint(contents, folder="one", changed=OLD, records=RECORDS, unit_bytes=30, python=False):
        files = write(tmp_path / folder, contents, changed=changed)
        return scan_files(files, records, unit_bytes, NOWHERE, python=python).fingerprint

    same = fingerprint(contents)
    assert fingerprint(contents, folder="two/three") == same
    assert fingerprint(contents, changed=OLD + 5) == same
    others = [
        fingerprint(contents | {"b.txt": b"c"}),
        fingerprint(contents | {"c.parquet": b"brokem"}),
        fingerprint({"a2.jsonl" if name == "a.jsonl" else name: content for name, content in contents.items()}),
        fingerprint(contents | {"d.txt": b""}),
        fingerprint({"a.jsonl": contents["a.jsonl"], "b.txt": contents["c.parquet"], "c.parquet": contents["b.txt"]}),
        fingerprint(contents, records=TextRecords("body")),
        fingerprint(contents, unit_bytes=31),
        fingerprint(contents, python=True),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_unreadable_files_are_reported_and_scanned_again(tmp_path, opened):
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "c.parquet").mkdir()
    files = [SourceFile(name, tmp_path / name) for name in ("a.jsonl", "b.txt", "c.parquet", "d.jsonl.gz")]
    for _ in range(2):
        corpus = scan_files(files, RECORDS, 20, tmp_path / "kept")
        assert read(corpus) == [
            "a.jsonl: cannot be read (Is a directory)",
            "b.txt: cannot be read (No such file or directory)",
            "c.parquet: cannot be read (Is a directory)",
            "d.jsonl.gz: cannot be read (No such file or directory)",
        ]
        assert all(isinstance(unit, Broken) for unit in corpus.units)
    assert len(opened) == 8


def test_a_file_is_read_as_soon_as_its_permissions_allow(tmp_path, monkeypatch):
    """Permissions are no part of a file's time of change."""
    files = write(tmp_path, {"a.txt": b"1"})
    forbidden = PermissionError(13, "Permission denied")
    good = scan_files(files, RECORDS, 20, tmp_path / "kept")
    with monkeypatch.context() as patch:  # as root every file may be read
        patch.setattr(os, "access", lambda path, mode: False)
        patch.setattr(scan, "_read", lambda *rest: (_ for _ in ()).throw(forbidden))
        bad = scan_files(files, RECORDS, 20, tmp_path / "kept")
        assert read(bad) == ["a.txt: cannot be read (Permission denied)"]
    assert bad.fingerprint != good.fingerprint
    assert scan_files(files, RECORDS, 20, tmp_path / "kept") == good


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "long.txt"])
@pytest.mark.parametrize("how", ["gone", "changed", "folder"])
def test_a_file_that_vanishes_or_changes_after_the_scan_is_an_error(tmp_path, monkeypatch, name, how):
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / name)
        files = write(tmp_path, {name: (tmp_path / name).read_bytes()})
    else:
        monkeypatch.setattr(documents, "LONGEST", 4 if name == "long.txt" else 100)
        text = b"one\ntwo\n" if name == "long.txt" else b"one" if name == "a.txt" else b'{"text": "x"}\n'
        files = write(tmp_path, {name: gzip.compress(text) if name.endswith("gz") else text})
    corpus = scan_files(files, RECORDS, 20, tmp_path / "kept")
    assert all(isinstance(one, tuple) for one in read(corpus))
    if how == "changed":
        write(tmp_path, {name: (tmp_path / name).read_bytes()}, changed=OLD + 1)
    else:
        (tmp_path / name).unlink()
        if how == "folder":
            (tmp_path / name).mkdir()
    with pytest.raises(UserError) as caught:
        read(corpus)
    reason = (
        "can no longer be read (No such file or directory)"
        if how == "gone"
        else "changed while the corpus was being read"
    )
    assert str(caught.value).startswith(f"data: {name} {reason}")


def test_progress_is_never_reported_by_two_threads_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_BLOCK", 10)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    busy, seen, threads = threading.Lock(), [], set()

    def progress(size):
        assert busy.acquire(blocking=False)
        time.sleep(0.001)
        seen.append(size)
        threads.add(threading.get_ident())
        busy.release()

    scan_files(write(tmp_path, {f"{i}.txt": b"x" * 100 for i in range(16)}), RECORDS, 20, tmp_path / "kept", progress)
    assert sum(seen) == 1600
    assert len(threads) > 1


@pytest.mark.skipif(os.name == "nt", reason="signals go to threads on POSIX only")
def test_an_interrupt_does_not_wait_for_files_in_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_BLOCK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    files = write(tmp_path, {"a.txt": b"x", "b.txt": b"x" * 100_000})
    seen = []

    def progress(size):
        seen.append(size)
        if len(seen) == 20:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.001)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scan_files([*files, SourceFile("c.txt", files[1].path)], RECORDS, 20, tmp_path / "kept", progress)
    assert time.monotonic() - began < 40
    assert len(seen) < 10_000
    assert not (tmp_path / "kept").exists()


def test_a_bad_file_name_is_escaped():
    assert str(Bad("\udcff\n.txt", "empty")) == r"\udcff\n.txt: empty"

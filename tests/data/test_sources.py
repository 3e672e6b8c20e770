"""Which files a corpus is of and what they are called, and the place of a document in the split."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybridlm.config.data import CorpusConfig, DataConfig
from hybridlm.data.preparing.split import position
from hybridlm.data.reading import scan
from hybridlm.data.reading.documents import Bad, Document
from hybridlm.data.reading.sources import open_corpus
from hybridlm.errors import UserError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def opened(config, cache=Path(os.devnull), unit_bytes=1 << 20):
    return open_corpus(config, unit_bytes=unit_bytes, cache=cache)


def documents(config):
    found = [document for unit in opened(config).units for document in unit.documents()]
    return [(document.name, document.text) if isinstance(document, Document) else str(document) for document in found]


def test_files_are_read_below_the_glob_in_order_of_name(tmp_path, monkeypatch):
    write(
        tmp_path,
        {
            "c/b.txt": "bee",
            "c/a/z.txt": "zed\r\n",
            "c/a/skip.md": "no",
            "c/empty.txt": "",
            "c/mark.txt": b"\xef\xbb\xbf\xc3\xa9",
        },
    )
    expected = [("a/z.txt", "zed\r\n"), ("b.txt", "bee"), "empty.txt: empty", ("mark.txt", "é")]
    assert documents(CorpusConfig(source="files", path=f"{tmp_path}/c/**/*.txt")) == expected
    monkeypatch.chdir(tmp_path)
    assert documents(CorpusConfig(source="files", path="c/**/*.txt")) == expected
    assert documents(CorpusConfig(source="files", path="c/b.txt")) == [("b.txt", "bee")]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{tmp}/c/*/z.txt", ["a/z.txt", "d/z.txt"]),
        ("{tmp}/c/a/z.txt", ["z.txt"]),
        ("{tmp}/./c//a/../a/*.txt", ["z.txt"]),
        ("c/[ad]/*", ["a/z.txt", "d/z.txt"]),
        ("./c/*/*.txt", ["a/z.txt", "d/z.txt"]),
        ("c/../c/*/*.txt", ["a/z.txt", "d/z.txt"]),
        ("**/*.txt", ["c/a/z.txt", "c/d/z.txt"]),
        ("*/*/z.txt", ["c/a/z.txt", "c/d/z.txt"]),
        ("~/c/a/*.txt", ["z.txt"]),
    ],
)
def test_names_begin_below_the_first_part_with_a_wildcard(tmp_path, monkeypatch, pattern, names):
    write(tmp_path, {"c/a/z.txt": "1", "c/d/z.txt": "2"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [name for name, _ in documents(CorpusConfig(source="files", path=pattern.format(tmp=tmp_path)))] == names


def test_a_corpus_is_the_same_in_any_place(tmp_path, monkeypatch):
    content = {"c/a/z.jsonl": '{"text": "x"}\n', "c/b.txt": "bee"}
    for place in ("here", "there"):
        write(tmp_path / place, content)
    monkeypatch.chdir(tmp_path / "there")
    paths = (f"{tmp_path}/here/c/**/*", f"{tmp_path}/there/**/c/../c/**/*", "c/**/*", f"{tmp_path}/here/**/*")
    one, _, two, above = (opened(CorpusConfig(source="files", path=path)).fingerprint for path in paths)
    assert one == two
    assert above != one


def test_folders_and_dead_links_are_not_documents(tmp_path):
    write(tmp_path, {"c/a.txt": "1"})
    (tmp_path / "c" / "folder.txt").mkdir()
    (tmp_path / "c" / "link.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "c" / "other.txt").symlink_to(tmp_path / "c" / "a.txt")
    assert documents(CorpusConfig(source="files", path=f"{tmp_path}/c/*.txt")) == [("a.txt", "1")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(source="files", path="nothing/*.txt"), "matches no file"),
        (DataConfig(source="files", path="c/*/"), "matches no file"),
        (DataConfig(source="files", path="c/bin"), r"matches no file .*left out: 1 \.bin files"),
        (DataConfig(source="files", path=("c/d", "c/{a,b}*.txt")), r"data\.path=c/\{a,b\}\*\.txt matches no file"),
        (
            DataConfig(source="files", path="c/d/*.txt", val_path="c/d"),
            r"data\.val_path: names all files of data\.path",
        ),
        (
            DataConfig(source="files", path="c/*", format="chat"),
            r"latin\.bin holds no records; data\.format=chat reads \.jsonl",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, config, message):
    write(tmp_path, {"c/latin.bin": b"ab\xe9", "c/d/e.txt": "e", "c/bin/x.bin": "x"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        opened(config)
    assert len(str(caught.value).splitlines()) == 1


def test_a_field_that_no_line_has_is_bad_in_every_line(tmp_path):
    write(tmp_path, {"a.jsonl": '{"body": "x"}\n' * 3})
    config = CorpusConfig(source="files", path=f"{tmp_path}/*.jsonl")
    assert documents(config) == [f"a.jsonl:{line}: no field 'text' (it has body)" for line in (1, 2, 3)]
    assert documents(config.model_copy(update={"text_field": "body"})) == [
        (f"a.jsonl:{line}", "x") for line in (1, 2, 3)
    ]


def test_conversations_are_read_as_such(tmp_path):
    write(tmp_path, {"a.jsonl": '{"prompt": "one", "response": "two"}\n'})
    (unit,) = opened(CorpusConfig(source="files", path=f"{tmp_path}/*.jsonl", format="chat")).units
    (document,) = unit.documents()
    assert document.turns == (("user", "one"), ("assistant", "two"))


def test_what_was_found_is_kept_for_a_place_and_a_size_of_units(tmp_path, monkeypatch):
    write(tmp_path, {"c/a.jsonl": '{"text": "x"}\n' * 9})
    os.utime(tmp_path / "c" / "a.jsonl", (1e9, 1e9))
    read = []
    monkeypatch.setattr(
        scan, "_scan", lambda file, *rest, real=scan._scan: (read.append(file.name), real(file, *rest))[1]
    )
    monkeypatch.chdir(tmp_path)
    config = CorpusConfig(source="files", path="c/*.jsonl")

    def again(config, unit_bytes):
        read.clear()
        corpus = opened(config, tmp_path / "cache", unit_bytes)
        return len(corpus.units), len(read)

    assert again(config, 40) == (3, 1)
    assert again(config, 20) == (5, 1)
    assert again(config, 40) == (3, 0)
    assert again(config.model_copy(update={"path": f"{tmp_path}/c/*.jsonl", "text_field": "body"}), 20) == (5, 0)
    assert {path.parent.name for path in (tmp_path / "cache").rglob("*.json")} == {"scans"}


def test_stdlib_skips_tests_packages_and_tables_and_names_what_it_cannot_decode(tmp_path, monkeypatch):
    skipped = [
        "site-packages/a.py",
        "dist-packages/a.py",
        "test/a.py",
        "json/tests/a.py",
        "idlelib/a.py",
        "lib2to3/a.py",
        "encodings/a.py",
    ]
    skipped += ["pydoc_data/a.py", "x/__pycache__/a.py", "config-3.11-x86_64/a.py", "note.txt"]
    write(tmp_path, dict.fromkeys(skipped, "x = 1\n"))
    write(tmp_path, {"b.py": "b = 1\n", "a/testing.py": "a = 'é'\n", "latin.py": b"# coding: latin-1\n# \xe9\n"})
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = documents(CorpusConfig())
    assert [one for one in found if isinstance(one, tuple)] == [
        ("a/testing.py", "a = 'é'\n"),
        ("b.py", "b = 1\n"),
    ]
    (bad,) = (one for one in found if isinstance(one, str))
    assert bad.startswith("latin.py: not UTF-8 (byte 20")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "x"))
    with pytest.raises(UserError, match="without its sources"):
        opened(CorpusConfig())


def test_this_interpreter_has_a_library_worth_learning():
    found = documents(CorpusConfig())
    names = {one[0] for one in found if isinstance(one, tuple)}
    assert {"os.py", "json/decoder.py"} <= names
    assert not [
        name for name in names if name.startswith(("test/", "site-packages/", "encodings/")) or "/tests/" in name
    ]
    assert 2e6 < sum(len(one[1]) for one in found if isinstance(one, tuple)) < 30e6


def test_the_place_of_a_document_is_even_and_always_the_same():
    # Written down once: a change of the hash would move documents from training to validation in everybody's old runs.
    assert [round(position(Document("a", text)), 6) for text in ("import os\n", "é")] == [0.021819, 0.89683]
    places = [position(Document("a", f"text {i}")) for i in range(2000)]
    assert all(0 <= place < 1 for place in places)
    assert 150 < sum(place < 0.1 for place in places) < 250


def test_lines_keep_their_place_when_others_come_and_go(tmp_path):
    """And equal texts are never on both sides."""

    def places(texts):
        write(tmp_path, {"a.jsonl": "".join(f'{{"text": "{text}"}}\n' for text in texts)})
        (unit,) = opened(CorpusConfig(source="files", path=f"{tmp_path}/a.jsonl")).units
        return {(document.text, position(document)) for document in unit.documents()}

    before = places([f"text {i % 150}" for i in range(300)])
    assert len(before) == 150
    assert places([f"new {i}" for i in range(40)] + [f"text {i}" for i in range(150)]) > before


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_a_file_name_that_is_not_text_has_a_position_and_can_be_shown(tmp_path):
    name = os.fsdecode(b"\xff.txt")
    write(tmp_path, {f"c/{name}": "x", f"c/bad{name}": ""})
    corpus = opened(CorpusConfig(source="files", path=f"{tmp_path}/c/*.txt"), tmp_path / "cache")
    (unit,) = corpus.units
    bad, good = unit.documents()
    assert isinstance(bad, Bad)
    assert str(bad) == r"bad\udcff.txt: empty"
    assert (good.name, 0 <= position(good) < 1) == (name, True)

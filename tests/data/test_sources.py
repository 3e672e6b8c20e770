import logging
import os

import pytest

from hybridlm.config.data import DataConfig
from hybridlm.config.section import ConfigError
from hybridlm.data import sources
from hybridlm.data.sources import Document, documents, is_validation, split


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_files_are_read_below_the_glob_in_order_of_name(tmp_path, monkeypatch):
    write(
        tmp_path, {"c/b.txt": "bee", "c/a/z.txt": "zed\r\n", "c/a/skip.md": "no", "c/empty.txt": "", "c/mark.txt": b"\xef\xbb\xbf\xc3\xa9"}
    )
    expected = [("a/z.txt", "zed\r\n"), ("b.txt", "bee"), ("mark.txt", "é")]
    found = documents(DataConfig(source="files", path=f"{tmp_path}/c/**/*.txt"))
    assert [(document.name, document.text) for document in found] == expected
    monkeypatch.chdir(tmp_path)
    assert [(document.name, document.text) for document in documents(DataConfig(source="files", path="c/**/*.txt"))] == expected
    assert [document.name for document in documents(DataConfig(source="files", path="c/b.txt"))] == ["b.txt"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(source="files"), "data.path: a glob"),
        (DataConfig(source="files", path="nothing/*.txt"), "matches no file"),
        (DataConfig(source="files", path="c"), r"is a folder.*c/\*\*/\*\.txt"),
        (DataConfig(source="files", path="c/*.bin"), r"latin\.bin: not UTF-8 \(byte 2"),
        (DataConfig(source="stdlib", path="c/*.txt"), "set data.source=files"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, config, message):
    write(tmp_path, {"c/latin.bin": b"ab\xe9"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        list(documents(config))
    assert len(str(caught.value).splitlines()) == 1


def test_stdlib_skips_tests_packages_and_tables_and_reports_what_it_cannot_decode(tmp_path, caplog):
    skipped = ["site-packages/a.py", "dist-packages/a.py", "test/a.py", "json/tests/a.py", "idlelib/a.py", "lib2to3/a.py", "encodings/a.py"]
    skipped += ["pydoc_data/a.py", "x/__pycache__/a.py", "config-3.11-x86_64/a.py", "note.txt"]
    write(tmp_path, dict.fromkeys(skipped, "x = 1\n"))
    write(tmp_path, {"b.py": "b = 1\r\n", "a/testing.py": "a = 1\n", "latin.py": b"# coding: latin-1\n# \xe9\n"})
    write(tmp_path, {"bad.py": b"x = '\xff'\n", "worse.py": b"# coding: klingon\n"})
    with caplog.at_level(logging.WARNING):
        found = list(sources._stdlib(tmp_path))
    assert [(document.name, document.text) for document in found] == [
        ("a/testing.py", "a = 1\n"),
        ("b.py", "b = 1\n"),
        ("latin.py", "# coding: latin-1\n# é\n"),
    ]
    assert "2 file(s) skipped that cannot be decoded: bad.py, worse.py" in caplog.text
    with pytest.raises(ConfigError, match="without its sources"):
        list(sources._stdlib(tmp_path / "x"))


def test_this_interpreter_has_a_library_worth_learning():
    found = list(documents(DataConfig()))
    names = {document.name for document in found}
    assert {"os.py", "json/decoder.py"} <= names
    assert not [name for name in names if name.startswith(("test/", "site-packages/", "encodings/")) or "/tests/" in name]
    assert 2e6 < sum(len(document.text) for document in found) < 30e6


def test_the_split_is_stable_when_the_corpus_grows():
    small = [Document(f"{i}.txt", "x") for i in range(200)]
    large = small + [Document(f"more/{i}.txt", "y") for i in range(800)]
    val_small = {document.name for document in split(small, 0.1)[1]}
    train, val = split(large, 0.1)
    assert {document.name for document in val if document in small} == val_small
    assert 60 < len(val) < 140
    assert len(train) + len(val) == 1000
    # Written down once: a change of the hash would move documents from training to validation in everybody's old runs.
    assert [round(sources._position(name), 6) for name in ("os.py", "json/decoder.py")] == [0.850949, 0.231174]
    assert is_validation("os.py", 0.86)
    assert not is_validation("os.py", 0.85)


def test_a_split_that_leaves_one_side_empty_says_which_fractions_do_not():
    corpus = [Document("os.py", "x"), Document("json/decoder.py", "x")]
    for fraction, side in ((0.05, "none of"), (0.9, "all")):
        with pytest.raises(ConfigError, match=rf"holds out {side} the 2 documents.*above 0\.231174 and up to 0\.850949"):
            split(corpus, fraction)
    assert split(corpus, 0.5) == ([corpus[0]], [corpus[1]])
    with pytest.raises(ConfigError, match="2 or more are needed"):
        split(corpus[:1], 0.5)


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_a_file_name_that_is_no_text_can_be_split():
    assert is_validation(os.fsdecode(b"\xff.txt"), 1.0)

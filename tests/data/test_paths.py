"""Which files a path means."""

from __future__ import annotations

import os

import pytest

from hybridlm.data.reading.paths import find_files
from hybridlm.errors import ConfigError, UserError


def write(folder, *names, content="x"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content} {name}")


def names(*patterns):
    return list(find_files("data.path", patterns if len(patterns) > 1 else patterns[0]).files)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_means_its_text_files(here):
    write(
        here, "n/a.txt", "n/deep/b.md", "n/c.jsonl", "n/.hidden.txt", "n/.git/d.txt", "n/e.png", "n/f.png", "n/LICENSE"
    )
    (here / "n/g.txt").write_bytes(b"\0\1")
    found = find_files("data.path", "n")
    assert list(found.files) == ["a.txt", "c.jsonl", "deep/b.md"]
    assert found.left_out == {
        ".png files": 2,
        "hidden folders": 1,
        "hidden": 1,
        "files without an ending": 1,
        "binary": 1,
    }
    assert found.notes[0].startswith("data.path: reading 3 file(s); left out: 2 .png files, ")


def test_lists_and_braces(here):
    write(here, "a/x.txt", "b/x.txt", "b/y.md", "b/z.rst", "b/w.html")
    assert names("a", "b/*.{md,rst}") == ["a/x.txt", "b/y.md", "b/z.rst"]
    assert names("b/{x,y}.*") == ["x.txt", "y.md"]
    with pytest.raises(UserError, match="more than 1000 patterns"):
        names("{a,b}" * 40)


@pytest.mark.parametrize("folder", ["[D]", "a{b,c}", "x=1 #2 (3)", "语料", "it's"])
def test_what_exists_is_taken_as_it_is_written(here, folder):
    write(here, f"{folder}/a.txt", f"{folder}/b.md")
    assert names(folder) == ["a.txt", "b.md"]
    assert names(f"{folder}/*.txt") == ["a.txt"]
    assert names(f"{folder}/a.txt") == ["a.txt"]


def test_every_real_file_comes_once(here):
    write(here, "c/a.txt", "c/d/b.txt")
    (here / "c/loop").symlink_to(here / "c")
    (here / "c/d/up").symlink_to(here / "c")
    (here / "c/link.txt").symlink_to(here / "c/d/b.txt")
    os.link(here / "c/a.txt", here / "c/z.txt")
    assert names("c/**/*.txt") == ["a.txt", "link.txt"]
    assert names("c", "c/*.txt", "c/a.txt") == ["a.txt", "link.txt"]
    assert names("**/b.txt") == ["c/d/b.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in a file system")
def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = find_files("data.path", str(tmp_path))
    assert (list(found.files), found.left_out) == (["a.txt"], {"pipes, devices and dead links": 2})
    assert list(find_files("data.path", f"{tmp_path}/*.txt").files) == ["a.txt"]
    with pytest.raises(ConfigError, match=r"pipe\.txt is neither a file nor a folder but a pipe"):
        find_files("data.path", str(tmp_path / "pipe.txt"))

"""Where export and import may write: a place that they cannot write is refused in a line and left as it was."""

from __future__ import annotations

import os
import shutil

import pytest
from architecture_cases import write_folder
from untrained import untrained_run

from hybridlm.cli.verbs import run_app


@pytest.fixture
def run(tmp_path):
    return untrained_run(tmp_path / "run", {"d_model": 32, "pattern": "T", "attention": {"n_heads": 2, "rope": True}})


def is_file(place):
    place.write_text("mine")


PLACES = {
    "a file": (is_file, "place"),
    "below a file": (is_file, "place/new"),
    "a link to nothing": (lambda place: place.symlink_to("nothing"), "place"),
    "below a link to nothing": (lambda place: place.symlink_to("nothing"), "place/new"),
    "a link to a folder": (lambda place: place.symlink_to("run"), "place"),
    "below a link to itself": (lambda place: place.symlink_to(place), "place/new"),
    "a long name": (lambda place: None, "a" * 300),
    "the run": (lambda place: None, "run"),
    "inside the run": (lambda place: None, "run/new"),
    "inside the run by a link": (lambda place: place.symlink_to("run"), "place/new"),
    "where nobody can write": (lambda place: None, "/proc/new/folder"),
}


@pytest.mark.parametrize("to", ["hf", "hf-code", "gguf", "safetensors"])
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_refused_and_left_alone(run, to, place, tmp_path, capsys):
    if to == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    make, target = PLACES[place]
    make(tmp_path / "place")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        run_app(["export", str(run), str(tmp_path / target), "--to", to])
    assert end.value.code == 2, capsys.readouterr().err
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to", ["hf", "hf-code", "gguf", "safetensors", "import"])
@pytest.mark.parametrize("size", [0, 3000])
def test_a_full_disk_leaves_nothing(run, to, size, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    if to == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    source, target = str(run), str(tmp_path / "below" / "new")
    if to == "import":
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        write_folder(theirs, "LlamaForCausalLM")
        shutil.copy(run / "tokenizer.json", theirs)
        source = str(theirs)
    there = sorted(os.listdir(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(SystemExit) as end:
            run_app(["import", source, target] if to == "import" else ["export", source, target, "--to", to])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert end.value.code == 2, error
    assert error.count("\n") == 1, error
    assert sorted(os.listdir(tmp_path)) == there

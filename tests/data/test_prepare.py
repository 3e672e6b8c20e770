import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hybridlm.config.data import DataConfig, TokenizerConfig
from hybridlm.config.section import ConfigError
from hybridlm.data import prepare as module
from hybridlm.data.prepare import data_folder, prepare
from hybridlm.data.sources import is_validation

BPE = TokenizerConfig(kind="bpe", vocab_size=300)
BYTES = TokenizerConfig(kind="bytes", vocab_size=4096)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / f"text/{i:02}.txt").write_text(f"document {i}: some words, the same words, é and ☃\n" * (i + 1), encoding="utf-8")
    return tmp_path


def config(folder, **changes):
    values = {"source": "files", "path": f"{folder}/text/*.txt", "out": f"{folder}/out", "tokenizer": BPE, "val_fraction": 0.2, **changes}
    return DataConfig(**values)


def expected_text(folder, *, val):
    paths = sorted(Path(folder, "text").glob("*.txt"))
    return [path.read_text(encoding="utf-8") for path in paths if is_validation(path.name, 0.2) == val]


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_the_streams_hold_every_document_and_the_counts_are_true(corpus, tokenizer):
    prepared = prepare(config(corpus, tokenizer=tokenizer))
    for file, val in ((prepared.train, False), (prepared.val, True)):
        texts = expected_text(corpus, val=val)
        tokens = file.tokens.tolist()
        eos = prepared.tokenizer.eos_id
        assert tokens[0] == tokens[-1] == eos
        borders = [place for place, token in enumerate(tokens) if token == eos]
        assert [prepared.tokenizer.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(borders)] == texts
        size = len("".join(texts).encode())
        assert file.meta.documents == len(texts)
        assert file.meta.text_bytes == size == prepared.tokenizer.token_bytes()[tokens].sum()
        assert file.meta.tokenizer == prepared.tokenizer.fingerprint
        assert file.meta.vocab_size == prepared.tokenizer.vocab_size
    assert prepared.train.meta.gzip_bytes is None
    assert 0 < prepared.val.meta.xz_bytes < size
    assert 0 < prepared.val.meta.gzip_bytes < size


def test_bpe_learns_from_the_training_documents_only(corpus):
    first = prepare(config(corpus)).tokenizer.fingerprint
    held_out = next(path for path in sorted(Path(corpus, "text").iterdir()) if is_validation(path.name, 0.2))
    held_out.write_text("entirely other text " * 99)
    assert prepare(config(corpus)).tokenizer.fingerprint == first


def test_the_second_time_nothing_is_built(corpus, monkeypatch):
    lines = []
    first = prepare(config(corpus), lines.append)
    assert any("prepared in" in line for line in lines)
    assert any("bits per byte" in line for line in lines)
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built twice"))
    lines.clear()
    second = prepare(config(corpus), lines.append)
    assert second.folder == first.folder
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert "already prepared" in lines[-1]


def test_a_small_corpus_says_how_many_ids_it_gave(corpus):
    lines = []
    size = prepare(config(corpus, tokenizer=TokenizerConfig(vocab_size=9000)), lines.append).tokenizer.vocab_size
    assert any(f"with {size} ids instead of the 9000 asked for" in line for line in lines)


def test_everything_that_matters_names_another_folder_and_nothing_else_does(corpus):
    base = prepare(config(corpus)).folder
    assert prepare(config(corpus, seq_len=17, global_batch=3)).folder == base
    byte_folder = prepare(config(corpus, tokenizer=BYTES)).folder
    assert prepare(config(corpus, tokenizer=TokenizerConfig(kind="bytes", vocab_size=300))).folder == byte_folder
    others = [byte_folder, prepare(config(corpus, val_fraction=0.4)).folder]
    others.append(prepare(config(corpus, tokenizer=TokenizerConfig(vocab_size=290))).folder)
    (corpus / "text/00.txt").write_text("changed")
    others.append(prepare(config(corpus)).folder)
    (corpus / "text/00.txt").rename(corpus / "text/renamed.txt")
    others.append(prepare(config(corpus)).folder)
    assert len({base, *others}) == 6


def test_a_killed_build_leaves_nothing_that_is_used(corpus):
    # The child dies by os._exit in the middle, as by kill -9: no handler and no cleanup runs.
    script = (
        "import os, sys\n"
        "from hybridlm.config.data import DataConfig\n"
        "from hybridlm.data import prepare as module\n"
        "write = module.write_bin\n"
        "module.write_bin = lambda path, *a, **k: os._exit(9) if path.name == 'val.bin' else write(path, *a, **k)\n"
        "module.prepare(DataConfig.model_validate_json(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, config(corpus).model_dump_json()], check=False)
    assert done.returncode == 9
    (leftover,) = (corpus / "out").iterdir()
    assert leftover.name.startswith(".files-")
    prepared = prepare(config(corpus))
    assert leftover.exists()  # maybe another process is at work there
    prepared.folder.rename(corpus / "away")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(leftover, (long_ago, long_ago))
    prepare(config(corpus))
    assert [path.name for path in (corpus / "out").iterdir()] == [prepared.folder.name]


def test_a_failed_build_cleans_up(corpus, monkeypatch):
    monkeypatch.setattr(module, "write_bin", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config(corpus))
    assert list((corpus / "out").iterdir()) == []


def test_two_at_once_both_get_the_data(corpus, monkeypatch):
    together = threading.Barrier(2, timeout=30)
    publish = module._publish

    def publish_together(unfinished, folder):
        together.wait()
        publish(unfinished, folder)

    monkeypatch.setattr(module, "_publish", publish_together)
    results = []
    threads = [threading.Thread(target=lambda: results.append(prepare(config(corpus)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert np.array_equal(results[0].train.tokens, results[1].train.tokens)
    assert [path.name for path in (corpus / "out").iterdir()] == [results[0].folder.name]


def test_damage_in_the_cache_is_named(corpus):
    folder = prepare(config(corpus)).folder
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"train\.bin has .* cut off"):
        prepare(config(corpus))
    other = prepare(config(corpus, tokenizer=BYTES)).folder
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    path.write_bytes((other / "train.bin").read_bytes())
    (folder / "train.json").write_bytes((other / "train.json").read_bytes())
    with pytest.raises(ConfigError, match=r"val\.bin was not made by the tokenizer beside it"):
        prepare(config(corpus))


def test_a_place_that_cannot_be_written_is_named(corpus):
    (corpus / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data cannot be written to .*file.*data\.out"):
        prepare(config(corpus, out=f"{corpus}/file"))


def test_where_prepared_data_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDLM_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert data_folder(DataConfig(out=str(tmp_path / "c"))) == tmp_path / "c"
    assert data_folder(DataConfig()) == tmp_path / "a" / "data"
    monkeypatch.delenv("HYBRIDLM_CACHE")
    assert data_folder(DataConfig()) == tmp_path / "b" / "hybridlm" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert data_folder(DataConfig()) == tmp_path / ".cache" / "hybridlm" / "data"

"""A token file or a packing that is cut or deleted while training reads it: a line, never a signal and never other
tokens."""

import os
from concurrent.futures import wait

import numpy as np
import pytest
from streams import EOS, raw_stream, some_documents, split

from hybridlm.data.files import stream as stream_module
from hybridlm.data.windows.loader import TrainLoader
from hybridlm.data.windows.packed_files import PackedStream
from hybridlm.data.windows.window_sources import CutWindows, PackedWindows
from hybridlm.errors import RunFailed

SIZE = 50_000  # tokens; more than a page of memory


def batches(source, workers=0):
    loader = TrainLoader(source, global_batch=4, micro_batch=4, accumulate=1, rank=0, world_size=1, workers=workers)
    while True:
        for batch in loader:
            wait(loader._ahead.values())  # so that no file is cut while a worker reads it
            yield batch


def take(training):
    """Many batches: what workers have made ahead is whole."""
    for _ in range(100):
        next(training)


def cut_windows(folder, files=1):
    stream = raw_stream(folder, [np.arange(SIZE) % 256] * files, [np.ones(SIZE)] * files)
    return CutWindows(stream, 64, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("ending", [".bin", ".mask"])
def test_a_file_that_is_cut_ends_the_run_in_a_line(tmp_path, workers, ending):
    training = batches(cut_windows(tmp_path), workers)
    next(training)
    os.truncate(tmp_path / f"0{ending}", 4096)
    with pytest.raises(RunFailed) as failed:
        take(training)
    line = str(failed.value)
    assert line.startswith(
        f"{tmp_path / '0'}{ending}: was truncated from {'100,000' if ending == '.bin' else '50,000'} to 4,096 bytes"
    )
    assert "ckpt=auto" in line
    assert "\n" not in line


def test_a_file_that_was_opened_may_be_deleted_and_one_that_was_not_may_not(tmp_path):
    source = cut_windows(tmp_path, files=2)
    before = source.rows(np.array([0, 100]))
    (tmp_path / "0.bin").unlink()
    assert np.array_equal(source.rows(np.array([0, 100])).ids, before.ids)
    (tmp_path / "1.bin").unlink()
    with pytest.raises(RunFailed, match=r"1\.bin: cannot be read \(No such file or directory\)"):
        source.rows(np.array([SIZE + 5]))


@pytest.mark.parametrize(("left", "said"), [(4096, "is truncated at 4,096 bytes"), (0, "is empty")])
def test_a_file_that_was_cut_before_it_was_opened_gives_no_other_tokens(tmp_path, left, said):
    source = cut_windows(tmp_path, files=2)
    os.truncate(tmp_path / "0.bin", left)
    with pytest.raises(RunFailed, match=said):
        source.rows(np.array([SIZE - 100]))


def test_a_truncated_packing_is_an_error_and_a_missing_one_is_rebuilt(tmp_path):
    text = split(tmp_path / "documents", some_documents(4000, seed=1), files=1).stream
    windows = PackedWindows(PackedStream(text, 16, eos_id=EOS, folder=tmp_path / "packed"), 3, isolate=True)
    before = windows.rows(np.array([0, 9]))
    (packing,) = (tmp_path / "packed").glob("*.bin")
    stream_module._opened.cache_clear()
    packing.unlink()
    windows._packed._sound.clear()
    assert np.array_equal(windows.rows(np.array([0, 9])).ids, before.ids)
    os.truncate(packing, 4096)
    with pytest.raises(RunFailed, match="was truncated from"):
        windows.rows(np.array([0, 9]))

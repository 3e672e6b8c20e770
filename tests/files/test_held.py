"""A file is held by one living process, and by no dead one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from hybridlm.errors import UserError
from hybridlm.files.held import Held, holding
from hybridlm.runs.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from hybridlm.files.held import holding
with holding(Path(sys.argv[1])) as held:
    held.sign()
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_living_process_holds_a_file(tmp_path):
    path = tmp_path / "run" / "train.lock"
    path.parent.mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        who = f"process {other.pid} on {socket.gethostname()}"
        for _ in range(2):  # a refusal changes nothing of it
            with pytest.raises(Held) as caught, holding(path):
                pass
            assert str(caught.value) == who
        with pytest.raises(UserError, match=f"run is being trained by {who}"), RunFolder(path.parent).training():
            pass
    finally:
        other.kill()
        other.wait()
    began = time.monotonic()
    with holding(path) as held:  # what the dead one wrote stays, and holds nobody up
        assert time.monotonic() - began < 5
        held.sign()
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert path.read_bytes() == b""


def test_where_nothing_came_of_it_there_is_no_file_and_no_folder(tmp_path):
    folder = RunFolder(tmp_path / "a/b/c")
    with folder.training():
        assert folder.path.is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot be written .*hydra\.run\.dir"),
        RunFolder(tmp_path / "file/x").training(),
    ):
        pass

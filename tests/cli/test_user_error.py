"""How commands end: mistakes, Ctrl-C and a machine that refuses are a line and a code; a fault of ours stays a
traceback."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridlm.cli import user_error
from hybridlm.cli.start import main
from hybridlm.cli.user_error import reported
from hybridlm.cli.verbs import run_app
from hybridlm.errors import ConfigError, RunFailed, UserError
from hybridlm.runs.run_folder import RunFolder

TRAIN = Path(__file__).resolve().parents[2] / "train.py"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What an ending changes in the process is put back."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.delenv("HYBRIDLM_TRACEBACK", raising=False)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def ended(capsys, error: BaseException) -> tuple[object, str]:
    with pytest.raises(SystemExit) as end, reported():
        raise error
    return end.value.code, capsys.readouterr().err


def limited(monkeypatch, limit: int) -> None:
    monkeypatch.setattr(user_error.resource, "getrlimit", lambda what: (limit, limit))


@pytest.mark.parametrize(
    ("error", "code", "begins"),
    [
        (UserError(["a", "b"]), 2, "error: a\nerror: b\n"),
        (ConfigError("a.b = \x1b[2J"), 2, "config error: a.b = \\x1b[2J\n"),
        (RunFailed("a"), 1, "error: a\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 1, "error: out of memory; use a smaller model or data.batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "error: out of memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), 1, "error: out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
            1,
            "error: out of memory",
        ),
        (RuntimeError("can't start new thread"), 1, "error: out of memory"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: No space left on device; free some space",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "outputs"),
            1,
            "error: outputs: Read-only file system; choose a writable place",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", b"a/\xff"),
            1,
            "error: a/\\udcff: Permission denied; choose a writable place",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "x"),
            1,
            "error: x: Too many open files; raise the limit on open files",
        ),
        (ConnectionError("two\nlines"), 1, "error: two lines (HYBRIDLM_TRACEBACK=1 shows where)"),
    ],
)
def test_each_is_told_in_a_line(capsys, monkeypatch, error, code, begins):
    limited(monkeypatch, resource.RLIM_INFINITY)
    got, lines = ended(capsys, error)
    assert (got, lines[: len(begins)]) == (code, begins)
    assert lines.count("\n") == max(1, begins.count("\n"))
    assert "Traceback" not in lines


def test_places_are_named_by_what_sets_them(capsys):
    _, line = ended(capsys, PermissionError(errno.EACCES, "Permission denied", "x"))
    assert all(name in line for name in ("hydra.run.dir", "data.out", "HYBRIDLM_CACHE"))


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), RuntimeError("a shape does not fit"), ImportError("no name"), SystemError("odd"), KeyError("x")],
)
def test_a_fault_of_ours_passes(monkeypatch, error):
    limited(monkeypatch, resource.RLIM_INFINITY)
    with pytest.raises(type(error)), reported():
        raise error


def test_a_library_that_breaks_under_a_limit_of_memory_is_told(capsys, monkeypatch):
    limited(monkeypatch, 700_000 * 1024)
    code, line = ended(capsys, SystemError("error return without exception set"))
    assert (code, line[:68]) == (1, "error: out of memory: this process may address 0.7 GiB (ulimit -v); ")


def test_the_traceback_stands_before_the_line_on_request(capsys, monkeypatch):
    monkeypatch.setenv("HYBRIDLM_TRACEBACK", "1")
    code, lines = ended(capsys, PermissionError(errno.EACCES, "Permission denied", "x"))
    assert code == 1
    assert lines.startswith("Traceback")
    assert lines.splitlines()[-1].startswith("error: x: Permission denied")


def test_a_working_folder_that_was_removed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as end:
        run_app(["generate", "last", "-p", "a"])
    assert (end.value.code, capsys.readouterr().err[:40]) == (1, "error: the working directory no longer e")


def test_ctrl_c_in_a_verb_is_a_line(capsys, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridlm.machine.doctor.run_doctor", interrupted)
    with pytest.raises(SystemExit) as end:
        run_app(["doctor"])
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


MOMENTS = (
    "cli.start.new_config",
    "data.preparing.duplicates.mark_duplicates",
    "data.preparing.build._merged",
    "train.run.layer_table",
)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_start_that_was_interrupted_leaves_nothing_in_the_way_of_the_next(
    tiny, tmp_path, monkeypatch, capsys, moment
):
    """While it composes, finds duplicates, writes token files, and builds the model."""
    arguments = [*tiny, f"data.out={tmp_path}/prepared", "data.dedup=true", "trainer.max_steps=2"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"hybridlm.{moment}", interrupt)
        with pytest.raises(SystemExit) as end:
            main([*arguments, f"hydra.run.dir={tmp_path}/run"])
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    main([*arguments, f"hydra.run.dir={tmp_path}/run", "ckpt=auto"])
    assert RunFolder(tmp_path / "run").summary.exists()
    assert not list(tmp_path.rglob(".*.partial"))


@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_ctrl_c_while_modules_are_imported_is_a_line(tmp_path, environment):
    line = [sys.executable, str(TRAIN), "size=tiny"]
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    maps = Path(f"/proc/{process.pid}/maps")
    while maps.exists() and "pydantic_core" not in maps.read_text():  # past the interpreter's own start
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v")
def test_a_machine_without_memory_is_a_line(tiny, tmp_path, environment):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (700_000 * 1024,) * 2)

    line = [sys.executable, str(TRAIN), *tiny, f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=120
    )
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: out of memory: this process may address 0.7 GiB (ulimit -v)")


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="a folder in which nobody may write, not even root")
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("hydra.run.dir=/sys/hybridlm/run", "hydra.run.dir"),
        ("data.out=/sys/hybridlm", "data.out or HYBRIDLM_CACHE"),
    ],
)
def test_a_place_that_cannot_be_written(tiny, tmp_path, capsys, override, says):
    with pytest.raises(SystemExit) as end:
        main([*tiny, f"hydra.run.dir={tmp_path}/run", override])
    assert end.value.code in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "/sys/hybridlm" in line
    assert says in line


def test_a_user_without_a_home(tiny, tmp_path, capsys, monkeypatch):
    """No HOME, and no entry among the accounts, as in a container."""
    for name in ("HOME", "HYBRIDLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    without = [line for line in tiny if not line.startswith("data.out")]
    lines = {
        ("prepare", *without): "HOME is not set; choose a folder with data.out or HYBRIDLM_CACHE",
        ("generate", "~/run", "-p", "a"): "~/run: ~ cannot be expanded",
    }
    for arguments, line in lines.items():
        with pytest.raises(SystemExit) as end:
            run_app(arguments)
        assert end.value.code == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ")
        assert line in said
    main([*tiny, "trainer.max_steps=2", f"hydra.run.dir={tmp_path}/run"])
    assert RunFolder(tmp_path / "run").summary.exists()

"""Are the tests worth something? Plants one error at a time in a copy of the package and asks that the tests fail.

    python tests/planted_errors.py                 # all of tests/planted_list.py, two at a time; exit code 1 if one
    goes unnoticed
    python tests/planted_errors.py mamba3 window   # those whose name contains one of the words

Not part of the suite: each planted error is a run of pytest.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planted_list import PLANTS, Plant

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds of one pytest run


def tokens_of(text: str) -> list[tokenize.TokenInfo]:
    """The tokens that mean something: no comments, line breaks, indentation or trailing commas. ``text`` may be a
    fragment whose brackets do not close."""
    found: list[tokenize.TokenInfo] = []
    with contextlib.suppress(tokenize.TokenError, IndentationError):
        found.extend(token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip())
    found = [token for token in found if token.type != tokenize.COMMENT]
    closes = [token.string in ")]}" for token in found[1:]] + [False]
    return [token for token, last in zip(found, closes, strict=True) if not (token.string == "," and last)]


def replaced(text: str, old: str, new: str) -> str:
    """``new`` in place of the one stretch of code that reads as ``old`` does, however either is laid out."""
    tokens, wanted = tokens_of(text), [token.string for token in tokens_of(old)]
    strings = [token.string for token in tokens]
    places = [i for i in range(len(tokens)) if strings[i : i + len(wanted)] == wanted]
    if len(places) != 1:
        raise ValueError(f"stands {len(places)} times: {old!r}")
    lines = text.splitlines(keepends=True)
    (first_row, first), (last_row, last) = tokens[places[0]].start, tokens[places[0] + len(wanted) - 1].end
    before = "".join(lines[: first_row - 1]) + lines[first_row - 1][:first]
    return before + new.strip() + lines[last_row - 1][last:] + "".join(lines[last_row:])


def planted(plant: Plant, package: Path) -> None:
    """Changes the copy of the package; every old text must stand in its file exactly once."""
    for file, old, new in plant.changes:
        path = package / file
        path.write_text(replaced(path.read_text(encoding="utf-8"), old, new), encoding="utf-8")


def noticed(plant: Plant) -> tuple[Plant, str | None, float]:
    """The first test that failed with the error planted, None if all passed, and the seconds it took."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("hybridlm", "tests", "conf", "experiments"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "train.py"):
            shutil.copy(ROOT / name, copy / name)
        planted(plant, copy / "hybridlm")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "--durations=0",
            *plant.tests,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{plant.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return plant, failed[0].split(" - ")[0] if failed else None, time.perf_counter() - began


def main(words: list[str]) -> int:
    chosen = [plant for plant in PLANTS if not words or any(word in plant.name for word in words)]
    missed = 0
    with ThreadPoolExecutor(2) as pool:
        for plant, test, seconds in pool.map(noticed, chosen):
            missed += test is None
            print(f"{'caught' if test else 'MISSED':6}  {plant.name:60}  {seconds:4.0f} s  {test or ''}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} planted errors caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

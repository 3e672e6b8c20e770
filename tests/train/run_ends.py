"""What tests of interrupted runs compare, and the processes of a run that they look for."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from hybridlm.runs.checkpoint import read_checkpoint
from hybridlm.runs.run_folder import RunFolder

EXACT = (
    "step",
    "train/loss",
    "val/bpb",
    "val/loss",
    "optim/lr",
    "optim/grad_norm",
    "data/tokens",
)  # the rest are times


def rows(folder: RunFolder) -> list[dict]:
    return [
        {key: row.get(key) for key in EXACT} for row in map(json.loads, folder.metrics_jsonl.read_text().splitlines())
    ]


def assert_same_end(ours: RunFolder, theirs: RunFolder, step: int = 12) -> None:
    """The same metrics, each step once, weights, state of the optimizer and of the callbacks, bit for bit."""
    assert rows(ours) == rows(theirs)
    mine, its = (read_checkpoint(folder.step_checkpoint(step)) for folder in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        assert_equal(mine[part], its[part], part)


def assert_equal(mine: object, its: object, where: str) -> None:
    """Bit for bit, also NaN."""
    assert type(mine) is type(its), where
    if isinstance(mine, torch.Tensor):
        assert mine.dtype == its.dtype, where
        assert torch.equal(mine.reshape(-1).view(torch.uint8), its.reshape(-1).view(torch.uint8)), where
    elif isinstance(mine, dict):
        assert mine.keys() == its.keys(), where
        for key, value in mine.items():
            assert_equal(value, its[key], f"{where}.{key}")
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(its), where
        for i, (one, other) in enumerate(zip(mine, its, strict=True)):
            assert_equal(one, other, f"{where}.{i}")
    else:
        assert mine == its, where


def second_rank(first: int) -> int:
    """The process that Lightning started beside the ``first``."""
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    (second,) = [int(number) for number in children if b"train.py" in Path(f"/proc/{number}/cmdline").read_bytes()]
    return second


def lives(process: int) -> bool:
    """Whether it runs; one that has ended and was not asked for its exit code does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def session(leader: int) -> set[int]:
    """The living processes of a session."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
            if int(number) == leader and state != "Z":
                found.add(int(path.parent.name))
    return found

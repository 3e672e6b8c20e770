"""What strangers' files hold: values of wrong kinds and sizes, put into valid files at random, and what reading one may
cost."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hybridlm.errors import RunFailed, UserError

SECONDS = 10
MEMORY = 2**30  # bytes that reading one file of a few kilobytes may take at most
VALUES = [
    None, True, False, 0, -1, 1, 2, 7, 10**9, -(10**9), 2**31, 2**40, 2**63 - 1, 0.0, -0.5, 1.5, 1e308, float("nan"),
    float("inf"),
    "", "x", "-1", "1" * 5000, "\x1b[2J\x07", "=1+1", "<script>alert(1)</script>", "ünïcode ☃", "???",
    "${oc.env:HOME}", "a\rb\nc",
    [], [None], [1, 2], ["a"], [[[[]]]], {}, {"a": 1}, {"_target_": "os.system"}, [0] * 1000,
]  # fmt: skip


def tensors(generator: random.Random) -> Tensor:
    """One that is no plain tensor, or of another shape or dtype than any model has."""
    return generator.choice(
        [
            lambda: torch.zeros(1).expand(10**6, 10**6),
            lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**9, 10**9)),
            lambda: torch.empty(10**5, 10**5, device="meta"),
            lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
            lambda: torch.zeros(0, 10**12),
            lambda: torch.zeros(3, 5),
            lambda: torch.zeros((), dtype=torch.bool),
            lambda: torch.ones(4, dtype=torch.complex64).conj(),
            lambda: torch.arange(6).reshape(2, 3).t(),
            lambda: torch.full((4,), float("nan")),
            lambda: torch.full((3,), -(2**62)),
        ]
    )()


def mutated(tree: object, generator: random.Random, strange: Callable[[random.Random], object]) -> object:
    """A copy with one to three values replaced by ``strange`` ones, left out, renamed, or put one level deeper."""
    tree = copy.deepcopy(tree)
    for _ in range(generator.randint(1, 3)):
        holder: object = tree
        key = None
        while True:
            keys = (
                list(holder)
                if isinstance(holder, dict)
                else list(range(len(holder)))
                if isinstance(holder, list)
                else []
            )
            if not keys or (key is not None and generator.random() < 0.25):
                break
            parent, key = holder, generator.choice(keys)
            holder = parent[key]
        if key is None:
            return strange(generator)
        action = generator.random()
        if action < 0.6:
            parent[key] = strange(generator)
        elif action < 0.75:
            del parent[key]
        elif action < 0.9 and isinstance(parent, dict):
            parent[generator.choice(["x", "", "\x1b[31m", key if isinstance(key, str) else "y"]) + "!"] = parent.pop(
                key
            )
        else:
            parent[key] = [parent[key]]
    return tree


@contextmanager
def little() -> Iterator[None]:
    """Within it an allocation past ``MEMORY`` fails, and it may take ``SECONDS``."""
    resource = pytest.importorskip("resource")
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    began = time.perf_counter()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.perf_counter() - began < SECONDS


def refused_or_read(read: Callable[[], object]) -> bool:
    """Whether ``read`` reads; where it does not, it must say why in a line that a terminal can take."""
    try:
        with little():
            read()
    except (UserError, RunFailed) as error:
        lines = error.problems if isinstance(error, UserError) else [str(error)]
        assert len(lines) == 1, lines
        assert lines[0].isprintable(), lines
        assert len(lines[0]) < 2_000, lines
        return False
    return True

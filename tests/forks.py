"""Processes that are forks of the test's own: they have imported everything already, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import pytest


def forked(function: Callable[..., object], *arguments: object, output: int | None = None) -> BaseProcess:
    """A process, started, that calls the function and ends. output: a file descriptor for both its streams, instead of
    the test's."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")

    def begin() -> None:
        for number, name in ((1, "stdout"), (2, "stderr")) if output is not None else ():
            os.dup2(output, number)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=begin)  # type: ignore[attr-defined]
    process.start()
    return process


def run_ranks(rank_main: Callable[[int, int], object], ranks: int = 2, timeout: float = 180.0) -> list[int | None]:
    """Calls ``rank_main(rank, port)`` in ``ranks`` processes, whose environment is one that torchrun gives. Returns
    their exit codes, None: still running after ``timeout`` seconds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def begin(rank: int) -> None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank_main(rank, port)

    processes = [forked(begin, rank) for rank in range(ranks)]
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes

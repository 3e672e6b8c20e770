"""Any command line composes, or is refused in printable lines and in time."""

from __future__ import annotations

import time
import traceback

import pytest
from random_overrides import random_overrides

from hybridlm.cli.compose import compose_config
from hybridlm.cli.user_error import lines_of
from hybridlm.config.overrides import split
from hybridlm.errors import UserError


def odd(seed: int) -> str | None:
    """What is wrong with how one command line ends; None: nothing."""
    overrides = random_overrides(seed)
    began = time.perf_counter()
    try:
        compose_config(split(overrides).overrides)
        said = ""
    except UserError as error:
        said, lines = lines_of(error), [line for problem in error.problems for line in problem.split("\n")]
        if len(lines) != len(error.problems) or not all(line.strip() for line in lines):
            return f"{seed} {overrides!r:.300}: {error.problems!r:.300}"
    except BaseException:
        return f"{seed} {overrides!r:.300}: {traceback.format_exc()[-900:]}"
    seconds = time.perf_counter() - began
    if seconds > 10 or not all(line.isprintable() and len(line) < 10_000 for line in said.split("\n")):
        return f"{seed} {overrides!r:.300}: {seconds:.1f} s, {said!r:.300}"
    return None


def test_some_random_command_lines():
    assert [problem for seed in range(60) if (problem := odd(seed))] == []


@pytest.mark.slow
def test_two_thousand_random_command_lines():
    assert [problem for seed in range(2000) if (problem := odd(seed))] == []

"""The command that makes a run again."""

from __future__ import annotations

import shlex

from hybridlm.report.reading import Run


def command_of(run: Run) -> str:
    """For a shell; the overrides are those that the run was started with."""
    return shlex.join(["python", "train.py", *(" ".join(line.split("\n")) for line in run.overrides)])


def differing(runs: list[Run]) -> tuple[str, ...]:
    """Names of the settings in which not all of ``runs`` agree, the seed among them; those without a configuration have
    no say."""
    configured = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in configured for key in run.config)
    return tuple(key for key in keys if len({run.setting(key) for run in configured}) > 1)

"""How a run was called: what it records of that, and repeats in its hints. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybridlm.errors import ConfigError


class NothingLeft(ConfigError):
    """The run has ended, and nothing beyond its end was asked for."""


def _nobody() -> None:
    """There are no other processes to wait for."""


@dataclass(frozen=True)
class Call:
    """verb: the words between the program's name and the overrides; overrides: of this start and, when it resumes, of
    the earlier ones.

    anew: may replace a run in the folder that has saved nothing; named: the checkpoint was named by its path, so that
    having nothing left to do is an error; sweep: a job of one of Hydra's sweeps; meet: called once everything that can
    be refused is checked and the folder is the run's own, returns when the other processes are ready.
    """

    verb: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    anew: bool = False
    named: bool = True
    sweep: bool = False
    meet: Callable[[], None] = _nobody

    @property
    def program(self) -> str:
        """What a user types to start it."""
        return f"hybridlm {' '.join(self.verb)}" if self.verb else "python train.py"

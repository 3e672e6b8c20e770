"""How a run was called: what it records of that, and repeats in its hints. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybridlm.errors import ConfigError


class NothingLeft(ConfigError):
    """The run has ended, and nothing was asked for beyond its end."""


def _nobody() -> None:
    """There is nobody to meet."""


@dataclass(frozen=True)
class Call:
    """verb: the words between the program's name and the overrides; overrides: of this start and, where it goes on, of
    those before.

    anew: a run that has begun in the folder and saved nothing is replaced; named: the checkpoint was named by its path,
    so that a run without anything left to do is a mistake; sweep: one of a sweep of Hydra's; meet: called once all that
    can be refused is behind the run and its folder is its own, returns when the other processes are as far.
    """

    verb: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    anew: bool = False
    named: bool = True
    sweep: bool = False
    meet: Callable[[], None] = _nobody

    @property
    def program(self) -> str:
        """What starts it, as a user types it."""
        return f"hybridlm {' '.join(self.verb)}" if self.verb else "python train.py"

"""What a run goes on from, looked at before anything in its folder is touched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hybridlm.checkpoint import KEY, read_checkpoint
from hybridlm.config.section import ConfigError

if TYPE_CHECKING:
    from hybridlm.hardware.machine import Machine
    from hybridlm.run_folder import RunFolder


class Resumed(NamedTuple):
    """Where a checkpoint stands, and the fingerprint of the tokenizer it was trained with."""

    step: int
    tokenizer: str


def resumable(resume: Path, machine: Machine, folder: RunFolder) -> Resumed:
    """What this run goes on from. ConfigError: it is past the end, or its steps were cut in another way.

    A run that was ended between its last step and its summary goes on too: with what comes after the last step.
    """
    content = read_checkpoint(resume)
    step, accumulate = int(content["global_step"]), content[KEY]["accumulate"]
    if accumulate != machine.accumulate:
        raise ConfigError(
            f"{resume}: its steps have {accumulate} micro-batches per device, this run's {machine.accumulate}; resume with "
            f"trainer.accumulate={accumulate} (Lightning counts its position in micro-batches)"
        )
    if step > machine.max_steps or (step == machine.max_steps and folder.summary.exists()):
        raise ConfigError(f"trainer.max_steps = {machine.max_steps}: {resume} is already at step {step}; give a larger number to go on")
    return Resumed(step, content[KEY]["tokenizer"])

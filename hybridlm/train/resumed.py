"""What a run goes on from, looked at before anything in its folder is touched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hybridlm.checkpoint import KEY, read_checkpoint
from hybridlm.errors import ConfigError, UserError

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.hardware.machine import Machine
    from hybridlm.run_folder import RunFolder


class Resumed(NamedTuple):
    """What a checkpoint says of its run: the step it stands at, its tokenizer's fingerprint, and micro-batches of a step per device."""

    path: Path
    step: int
    tokenizer: str
    accumulate: int

    @staticmethod
    def read(checkpoint: Path) -> Resumed:
        content = read_checkpoint(checkpoint)
        return Resumed(checkpoint, int(content["global_step"]), content[KEY]["tokenizer"], content[KEY]["accumulate"])

    def settle(self, config: RunConfig) -> RunConfig:
        """``config`` with this run's accumulation where nothing was said of it: a plan for another memory may not change it."""
        if config.trainer.accumulate != "auto" or config.data.batch_size != "auto":
            return config
        return config.model_copy(update={"trainer": config.trainer.model_copy(update={"accumulate": self.accumulate})})

    def refuse(self, machine: Machine, folder: RunFolder) -> None:
        """ConfigError: this run would be past its end, or its steps cut in another way.

        A run that was ended between its last step and its summary goes on too: with what comes after the last step.
        """
        if self.accumulate != machine.accumulate:
            raise UserError(
                f"{self.path}: its steps have {self.accumulate} micro-batches per device, this run's {machine.accumulate}; resume with "
                f"trainer.accumulate={self.accumulate} (Lightning counts its position in micro-batches)"
            )
        if self.step > machine.max_steps or (self.step == machine.max_steps and folder.summary.exists()):
            raise ConfigError(
                f"trainer.max_steps = {machine.max_steps}: {self.path} is already at step {self.step}; give a larger number to go on"
            )

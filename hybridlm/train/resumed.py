"""What a run goes on from, looked at before anything in its folder is touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ConfigDict, Field
from torch import Tensor

from hybridlm.checkpoint import KEY, PREFIX, read_checkpoint, rebuilt, refuse_misfits
from hybridlm.config.problems import recorded, show
from hybridlm.config.section import Section
from hybridlm.errors import ConfigError, UserError, printable
from hybridlm.train.call import NothingLeft

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.data.corpus import Prepared
    from hybridlm.hardware.machine import Machine
    from hybridlm.run_folder import RunFolder

TEXT = "text"  # the content of the corpora, among data_facts


class _Facts(Section):
    model_config = ConfigDict(extra="ignore", arbitrary_types_allowed=True)


class _Group(_Facts):
    params: list[int | str]  # names where the parameters were sharded


class _Optimizer(_Facts):
    state: dict[int | str, dict[str, Tensor | float]]
    param_groups: list[_Group]


class TrainingState(_Facts):
    """What Lightning and our callbacks take from a checkpoint beside the weights."""

    epoch: int = Field(ge=0, lt=2**62)
    optimizer_states: list[_Optimizer] = Field(min_length=1, max_length=1)
    lr_schedulers: list[dict[str, object]] = Field(min_length=1, max_length=1)
    loops: dict[str, dict[str, object]]
    callbacks: dict[str, dict[str, object]] = {}


class Resumed(NamedTuple):
    """What a checkpoint says of its run: the step it stands at, its tokenizer's fingerprint, micro-batches of a step per device, and what
    decides which tokens a step reads (``data_facts``; empty where it does not say)."""

    path: Path
    step: int
    tokenizer: str
    accumulate: int
    data: Mapping[str, object]

    @staticmethod
    def read(checkpoint: Path) -> Resumed:
        content = read_checkpoint(checkpoint)
        _refuse_damage(content, checkpoint)
        return Resumed(
            checkpoint, int(content["global_step"]), content[KEY]["tokenizer"], content[KEY]["accumulate"], content[KEY].get("data", {})
        )

    def settle(self, config: RunConfig) -> RunConfig:
        """``config`` with this run's accumulation where nothing was said of it: a plan for another memory may not change it."""
        if config.trainer.accumulate != "auto" or config.data.batch_size != "auto":
            return config
        return config.model_copy(update={"trainer": config.trainer.model_copy(update={"accumulate": self.accumulate})})

    def refuse(self, machine: Machine, folder: RunFolder, *, named: bool) -> None:
        """UserError: this run would be past its end, or its steps cut in another way; NothingLeft: it stands at its end, and nobody named
        this very checkpoint to go on from.

        A run that was ended between its last step and its summary goes on too: with what comes after the last step.
        """
        if self.step == machine.max_steps and folder.summary.exists() and not named:
            raise NothingLeft(f"{folder.path} has ended at step {self.step}; trainer.max_steps={2 * self.step} would go on")
        if self.accumulate != machine.accumulate:
            raise UserError(
                f"{self.path}: its steps have {self.accumulate} micro-batches per device, this run's {machine.accumulate}; resume with "
                f"trainer.accumulate={self.accumulate} (Lightning counts its position in micro-batches)"
            )
        if self.step > machine.max_steps or (self.step == machine.max_steps and folder.summary.exists()):
            raise ConfigError(
                f"trainer.max_steps = {machine.max_steps}: {self.path} is already at step {self.step}; give a larger number to go on"
            )

    def refuse_other_data(self, read: Mapping[str, object], tokenizer: str, changed: str, say: Callable[[str], None]) -> None:
        """UserError: this start would read other tokens than the one before. ``read``: its ``data_facts``; changed: data.changed."""
        if self.tokenizer != tokenizer:
            raise UserError(f"{self.path}: trained with another tokenizer than today's data gives; has the text or data.tokenizer changed?")
        differing = [name for name in read if name in self.data and self.data[name] != read[name]]
        if not differing:
            return
        what = ", ".join(
            "another training or validation text" if name == TEXT else f"{name}: {show(self.data[name])} -> {show(read[name])}"
            for name in differing
        )
        if changed == "refuse":
            raise UserError(f"{self.path}: its steps read other tokens ({what}); data.changed=accept goes on with today's all the same")
        say(f"data        changed since step {self.step}: {what}")


def data_facts(config: RunConfig, global_batch: int, prepared: Prepared) -> dict[str, object]:
    """What decides which tokens stand in which step, each by the field that says so, in plain types."""
    data = config.data
    digest = hashlib.sha256()
    for part in prepared.parts:
        keys = [[piece.key for piece in split.stream.pieces] for split in (part.train, part.val)]
        digest.update(json.dumps([part.name, part.weight, *keys]).encode())
    found: dict[str, object] = {"seed": config.seed, "data.seq_len": data.seq_len, "data.global_batch": global_batch}
    if data.source == "synthetic":
        return found | {f"data.synthetic.{name}": value for name, value in data.synthetic.model_dump(mode="json").items()}
    return found | {"data.packing": data.packing, "data.isolate": data.isolate, TEXT: digest.hexdigest()}


def _refuse_damage(content: Mapping[str, Any], path: Path) -> None:
    """UserError: weights that are not those of the model it names, or a state of training that Lightning could not go on from."""
    recorded(TrainingState, content, path)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in content["state_dict"].items() if name.startswith(PREFIX)}
    refuse_misfits(rebuilt(content[KEY], path), weights, path)
    for part in ("loops", "lr_schedulers"):
        if (place := _no_count(content[part], part)) is not None:
            raise UserError(f"{path}: {printable(place)} is no number that training counts")


def _no_count(value: object, place: str) -> str | None:
    """Where in a tree something else stands than numbers that are not negative, true and false."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return next((found for key, item in items if (found := _no_count(item, f"{place}.{key}")) is not None), None)
    return None if value is None or (isinstance(value, int | float) and 0 <= value < 2**62) else place

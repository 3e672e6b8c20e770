"""The training state in a checkpoint beside the weights: validated in full against the run that resumes from it, before
Lightning and the optimizer read it. They trust what they read, long after the run folder has been changed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from hybridlm.config.run import RunConfig
from hybridlm.config.section import Section
from hybridlm.data.windows.loader import Position
from hybridlm.errors import printable
from hybridlm.model.lm import HybridLM
from hybridlm.optim.optimizer import model_groups
from hybridlm.optim.updates import RULES, fresh_state

Count = Annotated[int, Field(ge=0, lt=2**40)]
Number = Annotated[float, Field(ge=0, lt=1e30)]


class GuardState(Section):
    """The state of ``GuardCallback``, which changes it in place."""

    model_config = ConfigDict(frozen=False, extra="ignore")  # older ones list the bad steps

    skipped: Count = 0  # bad steps of the run
    streak: Count = 0  # bad steps in a row, up to the last one
    rollbacks: Count = 0
    rate_scale: float = Field(1.0, gt=0, le=1)
    losses: list[float] = []  # of the last good steps, if spikes are detected


class _Facts(Section):
    model_config = ConfigDict(extra="ignore", arbitrary_types_allowed=True)


class _Loader(_Facts):
    combined_loader: list[Position] = Field(min_length=1, max_length=1)


class _FitLoop(_Facts):
    loader: _Loader = Field(alias="state_dict")  # its counters are not read: see ``LitLM.on_load_checkpoint``


class _Loops(_Facts):
    fit_loop: _FitLoop


@with_config(ConfigDict(extra="forbid", strict=True))
class _Stop(TypedDict):
    wait_count: Count
    best_score: float


class _Callbacks(_Facts):
    guard: GuardState | None = Field(None, alias="GuardCallback")
    best: Annotated[dict[Literal["best"], dict[Count, float]], Field(min_length=1)] | None = Field(
        None, alias="Checkpoints"
    )
    stop: _Stop | None = Field(None, alias="EarlyStop")


class _Group(_Facts):
    params: list[int]


class _Optimizer(_Facts):
    state: dict[int, dict[str, Tensor | float]]
    param_groups: list[_Group]


class _Scale(Section):
    """The loss scaler of fp16."""

    model_config = ConfigDict(extra="ignore")

    scale: Number
    growth_factor: Number
    backoff_factor: Number
    growth_interval: Count
    growth_tracker: Count = Field(alias="_growth_tracker")


class TrainingState(_Facts):
    """What Lightning and the callbacks read from a checkpoint."""

    lightning: str = Field(
        alias="pytorch-lightning_version", pattern=r"^2\.[1-9]\d{0,2}\.\d{1,3}(\.?(dev|rc|post)\d{0,8})?$"
    )
    global_step: Count
    optimizer_states: list[_Optimizer] = Field(min_length=1, max_length=1)
    loops: _Loops
    callbacks: _Callbacks
    scale: _Scale | None = Field(None, alias="MixedPrecision")
    old_scale: Literal[None] = Field(None, alias="native_amp_scaling_state")  # of Lightning before 2.0

    @property
    def position(self) -> Position:
        """Of the data loader."""
        return self.loops.fit_loop.loader.combined_loader[0]


def misfit_optimizer(model: HybridLM, config: RunConfig, saved: Mapping[str, Any]) -> str | None:
    """How the state of an optimizer does not fit ``model``, in words, or None. saved: of ``TrainingState``'s types."""
    groups = model_groups(model, config.optim)
    named = {id(parameter): (i, f"model.{name}") for i, (name, parameter) in enumerate(model.named_parameters())}
    own = [(*named[id(parameter)], parameter, group["algorithm"]) for group in groups for parameter in group["params"]]
    saved_groups = [group["params"] for group in saved["param_groups"]]
    keys = list(chain.from_iterable(saved_groups))
    if list(map(len, saved_groups)) != [len(group["params"]) for group in groups]:
        return "its groups of parameters are not those of the model"
    if not saved["state"].keys() <= set(keys):
        return "it has state of other parameters than those in its groups"
    # Numbered as in the model where they were sharded, which is how Lightning then reads them, else group by group.
    as_in_model, by_group = [number for number, *_ in own], [*range(len(own))]
    if keys != as_in_model and (config.trainer.strategy == "fsdp2" or keys != by_group):
        return "its parameters are not those of the model, or were saved without trainer.strategy=fsdp2"
    for key, (_, parameter_name, parameter, algorithm) in zip(keys, own, strict=True):
        found = saved["state"].get(key, {})
        if not found or algorithm not in RULES:  # no step yet, or a library's own state
            continue
        expected = fresh_state(algorithm, parameter)
        if found.keys() != expected.keys():
            return (
                f"its state of {parameter_name} has {printable(', '.join(sorted(map(str, found)))[:80]) or 'nothing'}"
            )
        for name, tensor in expected.items():
            value = found[name]
            if not isinstance(value, Tensor):
                return f"{name} of {parameter_name} is not a tensor"
            if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
                return f"{name} of {parameter_name} has shape {tuple(value.shape)} and dtype {value.dtype}"
    return None

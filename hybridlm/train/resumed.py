"""The checkpoint that a run resumes from, checked before anything in the run folder is touched: the one place that
decides whether a run may resume from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybridlm.config.problems import recorded, show
from hybridlm.config.run import RunConfig
from hybridlm.data.corpus import Prepared
from hybridlm.data.windows.loader import Position
from hybridlm.errors import ConfigError, UserError
from hybridlm.machine.description import Machine
from hybridlm.memory.plan import Plan, Planner
from hybridlm.memory.report import refusal
from hybridlm.memory.suggest import suggestions
from hybridlm.model.lm import HybridLM
from hybridlm.runs.checkpoint import EMA_KEY, KEY, read_checkpoint, rebuilt, refuse_misfits, weights_of
from hybridlm.runs.resume import NothingLeft, model_changes
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.initial import GivenWeights, given_weights
from hybridlm.train.saved_state import TrainingState, misfit_optimizer

TEXT = "text"  # the key for the content of the corpora in data_facts
BASE = "init_from"  # and, of preferences, for the digest of the weights that training started from


class Resumed(NamedTuple):
    """A checkpoint to resume from. step: optimizer steps done; tokenizer: its fingerprint; accumulate: micro-batches
    per device and step; data: what decides which tokens a step reads (``data_facts``; empty in old checkpoints);
    position: of the data loader; model: on "meta"."""

    path: Path
    step: int
    tokenizer: str
    accumulate: int
    data: Mapping[str, object]
    position: Position
    model: HybridLM

    @staticmethod
    def read(checkpoint: Path, config: RunConfig, *, verified: bool = False) -> Resumed:
        """config: of the run that is to resume; verified: the checksum was verified just now. UserError: it cannot
        resume from here, whatever the checksum says."""
        content = read_checkpoint(checkpoint, verified=verified)
        model, state = _trusted(content, config, checkpoint)
        facts = (content[KEY]["tokenizer"], content[KEY]["accumulate"], content[KEY].get("data", {}))
        return Resumed(checkpoint, state.global_step, *facts, state.position, model)

    def refuse(self, machine: Machine, folder: RunFolder, *, named: bool) -> None:
        """UserError: the checkpoint is past the last step, or its steps were split differently; NothingLeft: it is at
        the last step, and the checkpoint was not named by its path.

        A run that was stopped between its last step and its summary is resumed too, for what comes after the last step.
        """
        done = self.step == machine.max_steps and folder.summary.exists()
        if done and not named:
            raise NothingLeft(
                f"{folder.path} is complete at step {self.step}; use trainer.max_steps={2 * self.step} to continue"
            )
        if self.accumulate != machine.accumulate:
            raise UserError(
                f"{self.path}: was trained with {self.accumulate} micro-batches per step and device, this run has"
                f" {machine.accumulate}; resume with trainer.accumulate={self.accumulate}, so that"
                " its steps stay the same"
            )
        if done or self.step > machine.max_steps:
            raise ConfigError(
                f"trainer.max_steps = {machine.max_steps}: {self.path} is already at step {self.step}; use a larger"
                " number to continue"
            )

    def refuse_other_data(
        self, read: Mapping[str, object], tokenizer: str, changed: str, say: Callable[[str], None]
    ) -> None:
        """UserError: the data differ from those of the checkpoint. ``read``: the ``data_facts`` of this start; changed:
        data.changed."""
        if self.tokenizer != tokenizer:
            raise UserError(
                f"{self.path}: was trained with a different tokenizer; did the text or data.tokenizer change since?"
            )
        differing = [
            f"{name}: {show(self.data[name])} -> {show(read[name])}"
            if name != TEXT
            else "the training or validation text"
            for name in read
            if name in self.data and self.data[name] != read[name]
        ]
        if differing and changed == "refuse":
            raise UserError(
                f"{self.path}: was trained on different data ({', '.join(differing)}); use data.changed=accept to"
                " resume with today's data"
            )
        if differing:
            say(f"data        changed since step {self.step}: {', '.join(differing)}")


class Start(NamedTuple):
    """What a run starts from: its plan, the model on "meta" that was planned, and the checkpoint that it resumes from
    or a new run's given weights."""

    plan: Plan
    model: HybridLM
    resumed: Resumed | None
    given: GivenWeights | None = None

    @property
    def base(self) -> str:
        """The digest of the weights that the run started from, where a checkpoint records it or they are given."""
        if self.resumed is not None:
            return str(self.resumed.data[BASE])
        return "" if self.given is None else self.given.digest


def planned(config: RunConfig, checkpoint: Path | None, *, verified: bool = False) -> Start:
    """The plan of ``config``, or of a run of it that resumes from ``checkpoint``. verified: its checksum was verified
    just now. ConfigError: the run does not fit; with changes that would."""
    _refuse_objective(config)
    resumed = None if checkpoint is None else Resumed.read(checkpoint, config, verified=verified)
    given = None if resumed is not None or config.init_from is None else given_weights(config)
    settled = config
    if resumed is not None and (config.trainer.accumulate, config.data.batch_size) == ("auto", "auto"):
        # That of the checkpoint: a plan for another memory size must not change it.
        trainer = config.trainer.model_copy(update={"accumulate": resumed.accumulate})
        settled = config.model_copy(update={"trainer": trainer})
    planner = Planner(settled, (resumed and resumed.model) or (given and given.model))
    plan = planner.plan()
    if not plan.fits:
        raise ConfigError(refusal(plan, suggestions(settled, plan)))
    return Start(plan, planner.steps.model, resumed, given)


def _refuse_objective(config: RunConfig) -> None:
    """ConfigError: preferences without DPO, or DPO without weights to start from; `prepare` and `plan` need neither."""
    objective = config.optim.objective
    if config.data.format == "preferences" and objective != "dpo":
        raise ConfigError(f"optim.objective = {objective!r}: preferences are learned with optim=dpo")
    if objective == "dpo" and config.init_from is None:
        raise ConfigError(
            "init_from = null: optim.objective=dpo needs weights to start from, such as init_from=last, which are also"
            " what rewards are measured against"
        )


def data_facts(config: RunConfig, global_batch: int, prepared: Prepared) -> dict[str, object]:
    """What determines the tokens of each step, by field, in plain types."""
    data, digest = config.data, hashlib.sha256()
    for part in prepared.parts:
        keys = [[piece.key for piece in split.stream.pieces] for split in (part.train, part.val)]
        digest.update(json.dumps([part.name, part.weight, *keys]).encode())
    found: dict[str, object] = {"seed": config.seed, "data.seq_len": data.seq_len, "data.global_batch": global_batch}
    if data.source == "synthetic":
        return found | {
            f"data.synthetic.{name}": value for name, value in data.synthetic.model_dump(mode="json").items()
        }
    return found | {"data.packing": data.packing, "data.isolate": data.isolate, TEXT: digest.hexdigest()}


def _trusted(content: Mapping[str, Any], config: RunConfig, path: Path) -> tuple[HybridLM, TrainingState]:
    """The model on "meta" and the state of training. UserError: another architecture than the run's, weights or an
    average that do not fit it, or a state that training could not resume from."""
    state = recorded(TrainingState, content, path)
    model = rebuilt(content[KEY], path, config.model)
    if changes := model_changes(model.config, config.model):
        raise UserError(
            f"{path}: cannot resume with a different architecture; {', '.join(changes)}; start a new run without ckpt"
        )
    weights = weights_of(content)
    refuse_misfits(model, weights, path)
    if (averages := content.get(EMA_KEY)) is not None:
        refuse_misfits(model, {**weights, **averages}, path)
        if missing := sorted(name for name, _ in model.named_parameters() if name not in averages):
            raise UserError(f"{path}: its running average lacks {missing[0]}")
    step, place, accumulate = state.global_step, state.position, content[KEY]["accumulate"]
    problem = misfit_optimizer(model, config, content["optimizer_states"][0])
    if place["accumulate"] != accumulate or place["epoch"] > step or place["batches"] > step * accumulate:
        problem = f"its position in the data does not fit step {step}"
    if problem is not None:
        raise UserError(f"{path}: training cannot resume from its state ({problem})")
    return model, state

"""Bad steps are skipped and explained, and after several in a row training rolls back to a checkpoint.

``HybridOptimizer`` refuses a step whose gradient norm is not finite. A loss that is not finite makes the norm so
(``propagate_non_finite``), whichever rank it is on: gradients are summed over ranks, so all of them refuse the step
without communicating. This module does everything else, and finds where a bad step went wrong: the first layer whose
output is not finite, or else the first parameter whose gradient is not.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hybridlm.config.train import GuardConfig
from hybridlm.data.windows.loader import Batch
from hybridlm.errors import RunFailed, UserError
from hybridlm.model.lm import HybridLM
from hybridlm.optim.optimizer import HybridOptimizer
from hybridlm.runs.checkpoint import EMA_KEY, read_checkpoint
from hybridlm.runs.run_folder import RunFolder, step_of
from hybridlm.train.callbacks import EMA
from hybridlm.train.lightning_module import hybrid_optimizer, model_of
from hybridlm.train.saved_state import GuardState


class RunDiverged(RunFailed):
    """Training was stopped because steps kept failing."""


class GuardCallback(lightning.Callback):
    """Counts and explains the steps that the optimizer refused; rolls back after several in a row; stops the run if
    that does not help.

    A rollback restores the weights and moments of the last good checkpoint. Step count, schedule and data continue from
    where they are, so neither the batches of the bad steps nor those since the checkpoint are seen again. Must come
    before the callbacks that look at weights after a step.
    """

    def __init__(self, config: GuardConfig, folder: RunFolder, *, ckpt_every: int, say: Callable[[str], None]) -> None:
        """``say`` prints a line on the first rank. ``ckpt_every``: checkpoints of its multiples are preferred, as a run
        that was stopped has others besides, and must roll back to the same one as a run that was not."""
        self._config, self._folder, self._ckpt_every, self._say = config, folder, ckpt_every, say
        self._state = GuardState()
        self._step = 0
        self._batches: list[Batch] = []  # of the current step
        self._losses: list[Tensor] = []  # of its micro-batches

    def state_dict(self) -> dict[str, Any]:
        return self._state.model_dump()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = GuardState.model_validate(state_dict)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        optimizer = hybrid_optimizer(trainer)
        optimizer.rate_scale, optimizer.skipped = self._state.rate_scale, self._state.skipped
        optimizer.veto = lambda: self._spikes(trainer)
        self._step = trainer.global_step
        self._clear()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        hybrid_optimizer(trainer).refused = None
        self._batches.append(batch)

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach() / scale_of(trainer))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        optimizer, bad = hybrid_optimizer(trainer), hybrid_optimizer(trainer).refused
        if bad is None:  # the loss scaler skipped the step; a scale that was only too large is not an error
            bad = not math.isfinite(self._step_loss(trainer)) or scale_of(trainer) < 1
            optimizer.skipped += bad
        if bad:
            self._after_bad(trainer, pl_module, optimizer)
        else:
            self._state.streak = 0
            if self._config.spike_sigma is not None:
                self._state.losses = [*self._state.losses, self._step_loss(trainer)][-self._config.spike_window :]
        self._clear()

    def _clear(self) -> None:
        self._batches, self._losses = [], []

    def _step_loss(self, trainer: lightning.Trainer) -> float:
        """Of the current step over all micro-batches and ranks, each of which has its share times the number of
        shares."""
        return float(trainer.strategy.reduce(torch.stack(self._losses).sum(), reduce_op="mean"))

    def _spikes(self, trainer: lightning.Trainer) -> bool:
        before, sigma = self._state.losses, self._config.spike_sigma
        if sigma is None or len(before) < self._config.spike_window:
            return False
        return self._step_loss(trainer) > statistics.fmean(before) + sigma * statistics.pstdev(before)

    def _after_bad(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: HybridOptimizer
    ) -> None:
        state, config = self._state, self._config
        state.skipped, state.streak = optimizer.skipped, state.streak + 1
        cause = self._cause(trainer, module, optimizer)
        self._say(f"warning     step {self._step} skipped: {cause}; {state.streak} in a row, {state.skipped} in all")
        if state.streak >= config.rollback_after:
            if state.rollbacks == config.max_rollbacks:
                raise RunDiverged(
                    f"stopped at step {self._step}: {state.streak} bad steps in a row after {state.rollbacks}"
                    f" rollbacks; in the last one {cause}"
                )
            self._roll_back(trainer, optimizer)

    def _cause(self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: HybridOptimizer) -> str:
        norm, losses = optimizer.grad_norm, self._state.losses
        if optimizer.refused and norm is not None and math.isfinite(float(norm)):
            loss, mean = self._step_loss(trainer), statistics.fmean(losses)
            return f"the loss is {loss:.4g}, the last {len(losses)} average {mean:.4g}"
        cause = find_cause(model_of(module), self._batches, trainer.precision_plugin.train_step_context())
        return f"{cause} is not finite"

    def _roll_back(self, trainer: lightning.Trainer, optimizer: HybridOptimizer) -> None:
        state, first = self._state, self._step - self._state.streak + 1
        trainer.strategy.checkpoint_io.teardown()  # waits for a write in the background
        good: int | None = trainer.strategy.broadcast(self._good_step(first) if trainer.is_global_zero else None)
        done = "weights kept (no checkpoint yet)"
        if good is not None:
            done = f"weights and moments of step {good} restored"
            rates = [group["lr"] for group in optimizer.param_groups]
            content = trainer.strategy.load_checkpoint(self._folder.step_checkpoint(good), weights_only=True)
            trainer.strategy.load_model_state_dict(content)
            trainer.strategy.load_optimizer_state_dict(content)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate  # of the next step, not of the checkpoint's
            for average in [callback for callback in trainer.callbacks if isinstance(callback, EMA)]:  # type: ignore[attr-defined]
                average.restore(content[EMA_KEY])
        state.rollbacks, state.streak = state.rollbacks + 1, 0
        state.rate_scale *= self._config.lr_factor
        optimizer.rate_scale = state.rate_scale
        self._say(
            f"warning     steps {first} to {self._step} were bad: {done}, learning rates scaled by {state.rate_scale:g}"
            f" from now on, no batch is repeated; rollback {state.rollbacks} of at most {self._config.max_rollbacks}"
        )

    def _good_step(self, first_bad: int) -> int | None:
        """The newest readable checkpoint from before the bad steps."""
        paths = [path for path in self._folder.step_checkpoints() if step_of(path) < first_bad]
        for path in sorted(paths, key=lambda path: step_of(path) % self._ckpt_every != 0):
            try:
                read_checkpoint(path)
                return step_of(path)
            except UserError as error:
                self._say(f"warning     {error}")
        return None


def scale_of(trainer: lightning.Trainer) -> float:
    """The loss scale of 16-mixed; 1 in other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


class Cause(NamedTuple):
    """What was not finite ("output", "loss", "gradient", or "norm": finite gradients whose norm overflows float32), and
    the name in the model of the module or parameter that it belongs to."""

    what: str
    place: str = ""
    order: int = 0  # of several ranks' causes of one kind, the lowest is reported

    def __str__(self) -> str:
        if not self.place:
            return f"the {'gradient norm' if self.what == 'norm' else self.what}"
        layer = re.match(r"blocks\.(\d+)", self.place)
        return f"the {self.what} of " + (f"layer {layer[1]} ({self.place})" if layer else self.place)


_KINDS = ("output", "loss", "gradient", "norm")  # an earlier one explains the later ones


def find_cause(model: HybridLM, batches: Sequence[Batch], precision: AbstractContextManager[None]) -> Cause:
    """The first that went wrong on any rank in the step of these micro-batches, called while the gradients are still
    there and before the weights change. Every rank must call it: shards are gathered, and ranks exchange what they
    found.

    precision: the context in which training runs its forward.
    """
    mine = _bad_forward(model, batches, precision) or _bad_gradient(model) or Cause("norm")
    causes = [mine]
    if dist.is_initialized():
        causes *= dist.get_world_size()
        dist.all_gather_object(causes, mine)
    return min(causes, key=lambda cause: (_KINDS.index(cause.what), cause.order))


def _bad_forward(model: HybridLM, batches: Sequence[Batch], precision: AbstractContextManager[None]) -> Cause | None:
    """Runs the forward of every micro-batch again, even after something is found: with sharded weights the ranks must
    stay in step."""
    found: list[Cause] = []

    def look(cause: Cause, module: nn.Module | None, inputs: Any, output: Any) -> None:
        if not found and not _finite(output):
            found.append(cause)

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(partial(look, Cause("output", name))) for name, module in named]
    try:
        # Compiled blocks would skip the hooks of the modules inside them.
        with torch.no_grad(), precision, torch.compiler.set_stance("force_eager"):
            for batch in batches:
                output = model(batch["ids"], doc_ids=batch.get("doc_ids"), targets=batch["targets"])
                look(Cause("loss"), None, None, (output.loss_sum, output.aux))
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward the root keeps its gathered weights, which the next step outdates
    return found[0] if found else None


def _bad_gradient(model: nn.Module) -> Cause | None:
    """In the order of the backward, from the last module to the first."""
    for order, (name, parameter) in enumerate(reversed(list(model.named_parameters()))):
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if gradient is not None and not _finite(gradient):
            return Cause("gradient", name, order)
    return None


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return all(map(_finite, value)) if isinstance(value, (tuple, list)) else True

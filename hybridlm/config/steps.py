"""Rules between the number of steps of a run and the fields that count steps.

``trainer.max_steps=auto`` depends on the device, so these are checked again when a run is planned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridlm.config.optim import OptimConfig
    from hybridlm.config.run import RunConfig


def span(value: float, max_steps: int) -> int:
    """A number of steps; a value below 1 is a share of ``max_steps``."""
    return round(value * max_steps) if value < 1 else int(value)


def span_problems(optim: OptimConfig) -> list[str]:
    """What is wrong with warm-up and decay for any number of steps."""
    spans = {"optim.warmup": optim.warmup} | ({"optim.decay": optim.decay} if optim.schedule == "wsd" else {})
    problems = [
        f"{name} = {value:g}: a share of max_steps is below 1; a number of steps is written as an integer"
        for name, value in spans.items()
        if isinstance(value, float) and value >= 1
    ]
    if not problems and len(spans) == 2 and all(value < 1 for value in spans.values()) and sum(spans.values()) > 1:
        problems.append(
            f"optim.warmup + optim.decay = {optim.warmup:g} + {optim.decay:g}: longer than the run; shorten one of them"
        )
    return problems


def schedule_problems(optim: OptimConfig, max_steps: int, whence: str = "") -> list[str]:
    """What part of the learning-rate schedule a run of ``max_steps`` never reaches. whence: where an automatic number
    comes from."""
    if span_problems(optim):
        return []
    steps = f"trainer.max_steps = {max_steps}{whence}"
    if span(optim.warmup, max_steps) >= max_steps:
        return [
            f"optim.warmup = {optim.warmup:g}: not below {steps}, so the learning rate never reaches its peak; a share"
            " is 0.05"
        ]
    shares = optim.warmup < 1 and optim.decay < 1  # together no more than all, each rounded by itself
    if (
        optim.schedule == "wsd"
        and not shares
        and span(optim.warmup, max_steps) + span(optim.decay, max_steps) > max_steps
    ):
        return [
            f"optim.warmup + optim.decay = {optim.warmup:g} + {optim.decay:g}: more than {steps}; shorten one of them"
        ]
    return []


def never_reached(config: RunConfig, max_steps: int) -> str | None:
    """One line about periodic events that do not happen within ``max_steps``; None: all of them do."""
    trainer, callbacks = config.trainer, config.callbacks
    asked = [
        ("validation before the end", "trainer.val_every", trainer.val_every, 1),
        ("checkpoint before the end", "trainer.ckpt_every", trainer.ckpt_every, 1),
        ("logged step between the first and the last", "trainer.log_every", trainer.log_every, 1),
        (
            "early stop",
            "callbacks.early_stop.patience",
            _validations(trainer.val_every, callbacks.early_stop.patience, more=1),
            0,
        ),
        ("samples on the way", "callbacks.samples.every", _validations(trainer.val_every, callbacks.samples.every), 1),
        ("probes", "callbacks.probes.every", _validations(trainer.val_every, callbacks.probes.every), 0),
        (
            "skipped spike",
            "trainer.guard.spike_window",
            trainer.guard.spike_window if trainer.guard.spike_sigma is not None else None,
            1,
        ),
    ]
    missed = [
        f"no {what} ({field})" for what, field, step, before in asked if step is not None and step > max_steps - before
    ]
    return f"in {max_steps} steps there is {', '.join(missed)}" if missed else None


def _validations(every: int | None, count: int | None, more: int = 0) -> int | None:
    """The step of validation ``count`` + ``more``; None: there is none."""
    return None if every is None or count is None else every * (count + more)

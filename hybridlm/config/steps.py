"""Rules between the number of steps of a run and the fields that count steps.

``trainer.max_steps=auto`` depends on the device, so these are checked again when a run is planned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridlm.config.problems import broken

if TYPE_CHECKING:
    from hybridlm.config.optim import OptimConfig
    from hybridlm.config.run import RunConfig


def span(value: float, max_steps: int) -> int:
    """A number of steps; a value below 1 is a share of ``max_steps``."""
    return round(value * max_steps) if value < 1 else int(value)


def span_problems(optim: OptimConfig) -> list[str]:
    """What is wrong with warm-up and decay for any number of steps."""
    spans = {"optim.warmup": optim.warmup} | ({"optim.decay": optim.decay} if optim.schedule == "wsd" else {})
    shares = all(value < 1 for value in spans.values())
    return broken(
        *(
            (
                isinstance(value, float) and value >= 1,
                f"{name} = {value:g}: a share of max_steps is below 1; a number of steps is written as an integer",
            )
            for name, value in spans.items()
        ),
        (
            shares and sum(spans.values()) > 1,
            f"optim.warmup + optim.decay = {optim.warmup:g} + {optim.decay:g}: longer than the run; shorten one of"
            " them",
        ),
    )


def schedule_problems(optim: OptimConfig, max_steps: int, whence: str = "") -> list[str]:
    """What part of the learning-rate schedule a run of ``max_steps`` never reaches. whence: where an automatic number
    comes from."""
    if span_problems(optim):
        return []
    steps = f"trainer.max_steps = {max_steps}{whence}"
    warmup, decay = span(optim.warmup, max_steps), span(optim.decay, max_steps)
    shares = optim.warmup < 1 and optim.decay < 1  # together no more than all, each rounded by itself
    return broken(
        (
            warmup >= max_steps,
            f"optim.warmup = {optim.warmup:g}: not below {steps}, so the learning rate never reaches its peak; a share"
            " is 0.05",
        ),
        (
            optim.schedule == "wsd" and not shares and warmup < max_steps < warmup + decay,
            f"optim.warmup + optim.decay = {optim.warmup:g} + {optim.decay:g}: more than {steps}; shorten one of them",
        ),
    )


def never_reached(config: RunConfig, max_steps: int) -> str | None:
    """One line about periodic events that do not happen within ``max_steps``; None: all of them do."""
    trainer, callbacks, guard = config.trainer, config.callbacks, config.trainer.guard

    def validation(count: int | None) -> int | None:
        """The step of this validation; None: there is none."""
        return None if trainer.val_every is None or count is None else trainer.val_every * count

    patience, last = callbacks.early_stop.patience, max_steps - 1
    asked = [
        ("validation before the end (trainer.val_every)", trainer.val_every, last),
        ("checkpoint before the end (trainer.ckpt_every)", trainer.ckpt_every, last),
        ("logged step between the first and the last (trainer.log_every)", trainer.log_every, last),
        ("early stop (callbacks.early_stop.patience)", validation(patience and patience + 1), max_steps),
        ("samples on the way (callbacks.samples.every)", validation(callbacks.samples.every), last),
        ("probes (callbacks.probes.every)", validation(callbacks.probes.every), max_steps),
        ("skipped spike (trainer.guard.spike_window)", guard.spike_sigma and guard.spike_window, last),
    ]
    missed = [f"no {what}" for what, step, end in asked if step is not None and step > end]
    return f"in {max_steps} steps there is {', '.join(missed)}" if missed else None

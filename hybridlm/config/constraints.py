"""Rules between fields. Checked once each field is valid; all problems are reported together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hybridlm.config.data_constraints import data_problems
from hybridlm.config.duration import FORMS, seconds_of
from hybridlm.config.ffns import FFN_KINDS
from hybridlm.config.hardware import optimizer_problem, precision_problem
from hybridlm.config.mixers import MIXERS
from hybridlm.config.problems import broken
from hybridlm.config.run import RunConfig
from hybridlm.config.steps import schedule_problems, span_problems
from hybridlm.errors import ConfigError

# Precisions that Lightning's FSDP2 lacks, and one whose float32 weights it cannot shard with the others; what to use.
_NOT_SHARDED = {"64-true": "32-true", "bf16-true": "bf16-mixed"}


def constraint_problems(config: RunConfig) -> list[str]:
    """One line for each rule between fields that ``config`` breaks; sections that no layer uses are ignored."""
    optim, trainer, hardware, capability = (
        config.optim,
        config.trainer,
        config.hardware,
        config.hardware.compute_capability,
    )
    card = f"hardware={hardware.name}"
    further = [
        config.batch.problem,
        precision_problem(trainer.precision, hardware.accelerator, bf16=hardware.bf16, card=card),
        optimizer_problem(optim.name, hardware.accelerator),
    ]
    return [
        *_layer_problems(config),
        *broken(
            (
                config.size.name not in config.model.sizes,
                f"size = {config.size.name!r}: the preset {config.model.name} takes {', '.join(config.model.sizes)}",
            ),
            (
                optim.objective == "dpo" and config.data.format != "preferences",
                f"optim.objective = 'dpo': data.format={config.data.format} has no chosen and rejected answers; use"
                " data=preferences",
            ),
            (
                optim.sgd.nesterov and optim.sgd.momentum == 0,
                "optim.sgd.nesterov = true: needs optim.sgd.momentum above 0",
            ),
            (
                capability is not None and not re.fullmatch(r"[1-9]\d*\.\d", capability),
                f"hardware.compute_capability = {capability!r}: expected NVIDIA's number with one decimal, such as 8.6",
            ),
            (
                trainer.time_limit is not None and not seconds_of(trainer.time_limit),
                f"trainer.time_limit = {trainer.time_limit!r}: expected more than zero: {FORMS}",
            ),
        ),
        *data_problems(config.data),
        *span_problems(optim),
        *(schedule_problems(optim, trainer.max_steps) if trainer.max_steps != "auto" else ()),
        *_callback_problems(config),
        *(_sharding_problems(config) if trainer.strategy == "fsdp2" else ()),
        *(problem for problem in further if problem is not None),
    ]


def _layer_problems(config: RunConfig) -> list[str]:
    sweep, every = config.sweep, config.trainer.checkpoint_blocks
    try:
        depth = len(config.model.layers)
    except ConfigError as error:
        return error.problems
    problems = broken(
        (
            every != "auto" and every > depth,
            f"trainer.checkpoint_blocks = {every}: the model has {depth} layers; legal here: 0 to {depth}, or auto",
        ),
        (
            sweep.match is None and sweep.target is not None,
            f"sweep.target = {sweep.target}: needs sweep.match = params or flops",
        ),
        (
            sweep.match is not None and sweep.matched is None and config.init_from is not None,
            f"sweep.match = {sweep.match!r}: changes widths, which init_from fixes; leave one of them out",
        ),
    )
    if sweep.match is not None and sweep.target is None:
        try:
            _ = config.model.model_copy(update={"pattern": sweep.reference, "n_layers": depth}).layers
        except ConfigError as error:
            problems += [f"sweep.reference = {sweep.reference!r}: {problem}" for problem in error.problems]
    return problems


def _callback_problems(config: RunConfig) -> list[str]:
    """What a callback needs of the data, the loop and the strategy."""
    callbacks, trainer = config.callbacks, config.trainer
    synthetic, sharded = config.data.source == "synthetic", trainer.strategy == "fsdp2"
    samples, ema = callbacks.samples.every, callbacks.ema.decay
    asked = {
        "callbacks.samples.every": samples,
        "callbacks.early_stop.patience": callbacks.early_stop.patience,
        "callbacks.probes.every": callbacks.probes.every,
    }
    unsharded = "needs unsharded weights; use trainer.strategy=ddp instead of fsdp2, or leave it unset"
    return broken(
        *(
            (
                value is not None and trainer.val_every is None,
                f"{name} = {value}: counts validations, but trainer.val_every is null; set it to a number of steps",
            )
            for name, value in asked.items()
        ),
        *(
            (
                value is not None and synthetic and name != "callbacks.early_stop.patience",
                f"{name} = {value}: needs a text model, not data.source=synthetic; leave it null",
            )
            for name, value in asked.items()
        ),
        (sharded and samples is not None, f"callbacks.samples.every = {samples}: {unsharded}"),
        (sharded and ema is not None, f"callbacks.ema.decay = {ema}: {unsharded}"),
    )


def _sharding_problems(config: RunConfig) -> list[str]:
    """What FSDP2 cannot do, on any device."""
    precision = config.trainer.precision
    return broken(
        (
            precision in _NOT_SHARDED,
            f"trainer.precision = {precision!r}: is not supported with trainer.strategy=fsdp2; use"
            f" {_NOT_SHARDED.get(precision)} or ddp",
        ),
        (
            config.optim.name == "adamw8bit",
            "optim.name = 'adamw8bit': its state cannot be sharded; use optim=adamw or strategy=ddp",
        ),
    )


def overridden_sections(overrides: Sequence[str]) -> dict[str, str]:
    """The kinds of layers whose sections ``overrides`` (``a.b=c`` lines) change, with the first such field."""
    touched: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].strip().lstrip("+~")
        kind = re.match(r"model\.(?:ffn_after\.)?([^.]+)", key)
        if kind and kind[1] in (*MIXERS, *FFN_KINDS):
            touched.setdefault(kind[1], key)
    return touched


def unused_section_warnings(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """One line for each overridden section that has no effect, because no layer is of its kind."""
    used = config.model.kinds
    return [
        f"{key} has no effect: no layer is {kind}"
        for kind, key in overridden_sections(overrides).items()
        if kind not in used
    ]

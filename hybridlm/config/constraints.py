"""Rules between fields. Checked once each field is valid; all problems are reported together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hybridlm.config.data_constraints import data_problems
from hybridlm.config.device_rules import optimizer_problem, precision_problem
from hybridlm.config.duration import duration_problems
from hybridlm.config.ffns import FFN_KINDS
from hybridlm.config.logging_constraints import logging_problems
from hybridlm.config.mixers import MIXERS
from hybridlm.config.optim import OptimConfig
from hybridlm.config.run import RunConfig
from hybridlm.config.steps import schedule_problems, span_problems
from hybridlm.config.train import TrainerConfig
from hybridlm.errors import ConfigError

# Precisions that Lightning's FSDP2 lacks, and one whose float32 weights it cannot shard with the others; what to use.
_NOT_SHARDED = {"64-true": "32-true", "bf16-true": "bf16-mixed"}


def constraint_problems(config: RunConfig) -> list[str]:
    """One line for each rule between fields that ``config`` breaks; sections that no layer uses are ignored."""
    problems: list[str] = []
    try:
        layers = config.model.layers
        problems += _sweep_problems(config, len(layers))
        every = config.trainer.checkpoint_blocks
        if every != "auto" and every > len(layers):
            problems.append(
                f"trainer.checkpoint_blocks = {every}: the model has {len(layers)} layers; legal here: 0 to"
                f" {len(layers)}, or auto"
            )
    except ConfigError as error:
        problems += error.problems
    if config.size.name not in config.model.sizes:
        problems.append(
            f"size = {config.size.name!r}: the preset {config.model.name} takes {', '.join(config.model.sizes)}"
        )
    problems += data_problems(config.data)
    problems += [problem] if (problem := config.batch.problem) is not None else []
    problems += _optim_problems(config.optim, config.trainer)
    problems += logging_problems(config.logger, config.callbacks, config.trainer)
    capability = config.hardware.compute_capability
    if capability is not None and not re.fullmatch(r"[1-9]\d*\.\d", capability):
        problems.append(
            f"hardware.compute_capability = {capability!r}: expected NVIDIA's number with one decimal, such as 8.6"
        )
    problems += _device_problems(config) + _text_problems(config)
    problems += duration_problems("trainer.time_limit", config.trainer.time_limit)
    return problems


def _sweep_problems(config: RunConfig, depth: int) -> list[str]:
    sweep = config.sweep
    if sweep.match is None:
        return [] if sweep.target is None else [f"sweep.target = {sweep.target}: needs sweep.match = params or flops"]
    if sweep.target is not None:
        return []
    try:
        _ = config.model.model_copy(update={"pattern": sweep.reference, "n_layers": depth}).layers
    except ConfigError as error:
        return [f"sweep.reference = {sweep.reference!r}: {problem}" for problem in error.problems]
    return []


def _optim_problems(optim: OptimConfig, trainer: TrainerConfig) -> list[str]:
    problems = span_problems(optim)
    if not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas = [{optim.betas[0]:g}, {optim.betas[1]:g}]: expected two numbers >= 0 and < 1")
    if trainer.max_steps != "auto":
        problems += schedule_problems(optim, trainer.max_steps)
    if optim.sgd.nesterov and optim.sgd.momentum == 0:
        problems.append("optim.sgd.nesterov = true: needs optim.sgd.momentum above 0")
    return problems


def _device_problems(config: RunConfig) -> list[str]:
    """What the profile's device cannot do; and FSDP2, on any device."""
    hardware, precision, optimizer = config.hardware, config.trainer.precision, config.optim.name
    asked = [
        precision_problem(precision, hardware.accelerator, bf16=hardware.bf16, card=f"hardware={hardware.name}"),
        optimizer_problem(optimizer, hardware.accelerator),
    ]
    if config.trainer.strategy == "fsdp2":
        asked += [
            f"trainer.precision = {precision!r}: is not supported with trainer.strategy=fsdp2; use {instead} or ddp"
            for unsupported, instead in _NOT_SHARDED.items()
            if precision == unsupported
        ]
        if optimizer == "adamw8bit":
            asked.append("optim.name = 'adamw8bit': its state cannot be sharded; use optim=adamw or strategy=ddp")
    return [problem for problem in asked if problem is not None]


def _text_problems(config: RunConfig) -> list[str]:
    """What only works for a model of text."""
    callbacks = config.callbacks
    asked = {"callbacks.samples.every": callbacks.samples.every, "callbacks.probes.every": callbacks.probes.every}
    return [
        f"{name} = {value}: needs a text model, not data.source=synthetic; leave it null"
        for name, value in asked.items()
        if value is not None and config.data.source == "synthetic"
    ]


def overridden_sections(overrides: Sequence[str]) -> dict[str, str]:
    """The kinds of layers whose sections ``overrides`` (``a.b=c`` lines) change, with the first such field."""
    touched: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].strip().lstrip("+~")
        parts = key.split(".")
        kind = (
            parts[2] if parts[:2] == ["model", "ffn_after"] and len(parts) > 2 else parts[1] if len(parts) > 1 else ""
        )
        if parts[0] == "model" and kind in (*MIXERS, *FFN_KINDS):
            touched.setdefault(kind, key)
    return touched


def unused_section_warnings(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """One line for each overridden section that has no effect, because no layer is of its kind."""
    used = config.model.kinds
    return [
        f"{key} has no effect: no layer is {kind}"
        for kind, key in overridden_sections(overrides).items()
        if kind not in used
    ]

"""What must hold between fields. Runs once every field is valid by itself, and reports everything together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from hybridlm.config.data import DataConfig
from hybridlm.config.data_constraints import data_problems
from hybridlm.config.duration import duration_problems
from hybridlm.config.ffns import FFN_KINDS
from hybridlm.config.hardware import CPU, CUDA
from hybridlm.config.logging_constraints import logging_problems
from hybridlm.config.mixers import MIXERS
from hybridlm.config.optim import OptimConfig
from hybridlm.config.resolve import kinds_in_use, resolve_layers
from hybridlm.config.run import RunConfig
from hybridlm.config.steps import schedule_problems, span_problems
from hybridlm.config.train import TrainerConfig
from hybridlm.errors import ConfigError


def constraint_problems(config: RunConfig) -> list[str]:
    """One line for each rule between fields that ``config`` breaks; sections that no layer uses are not looked at."""
    problems: list[str] = []
    try:
        layers = resolve_layers(config.model)
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
    problems += _batch_problems(config.data, config.trainer)
    problems += _optim_problems(config.optim, config.trainer)
    problems += logging_problems(config.logger, config.callbacks, config.trainer)
    capability = config.hardware.compute_capability
    if capability is not None and not re.fullmatch(r"[1-9]\d*\.\d", capability):
        problems.append(
            f"hardware.compute_capability = {capability!r}: expected NVIDIA's number with one decimal, as 8.6"
        )
    problems += _precision_problems(config) + _strategy_problems(config) + _text_problems(config)
    problems += duration_problems("trainer.time_limit", config.trainer.time_limit)
    return problems


def _sweep_problems(config: RunConfig, depth: int) -> list[str]:
    sweep = config.sweep
    if sweep.match is None:
        return [] if sweep.target is None else [f"sweep.target = {sweep.target}: needs sweep.match = params or flops"]
    if sweep.target is not None:
        return []
    try:
        resolve_layers(config.model.model_copy(update={"pattern": sweep.reference, "n_layers": depth}))
    except ConfigError as error:
        return [f"sweep.reference = {sweep.reference!r}: {problem}" for problem in error.problems]
    return []


def _batch_problems(data: DataConfig, trainer: TrainerConfig) -> list[str]:
    """global_batch = batch_size x accumulate x devices, as far as they are numbers."""
    if data.global_batch == "auto":
        return []
    factors = {
        "data.batch_size": data.batch_size,
        "trainer.accumulate": trainer.accumulate,
        "trainer.devices": trainer.devices,
    }
    known = {name: value for name, value in factors.items() if value != "auto"}
    product = math.prod(known.values())
    if product == data.global_batch or (len(known) < len(factors) and data.global_batch % product == 0):
        return []
    terms = " x ".join(f"{name} ({value})" for name, value in known.items())
    relation = "is not" if len(known) == len(factors) else "is not a multiple of"
    remedy = (
        "leave one of them auto"
        if len(known) == len(factors)
        else f"take a multiple of {product}, or data.global_batch=auto"
    )
    return [
        f"data.global_batch = {data.global_batch}: {relation} {terms}{f' = {product}' if len(known) > 1 else ''};"
        f" {remedy}"
    ]


def _optim_problems(optim: OptimConfig, trainer: TrainerConfig) -> list[str]:
    problems = span_problems(optim)
    if not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas = [{optim.betas[0]:g}, {optim.betas[1]:g}]: expected two numbers >= 0 and < 1")
    if trainer.max_steps != "auto":
        problems += schedule_problems(optim, trainer.max_steps)
    if optim.sgd.nesterov and optim.sgd.momentum == 0:
        problems.append("optim.sgd.nesterov = true: looks ahead along optim.sgd.momentum, which is 0")
    return problems


def _precision_problems(config: RunConfig) -> list[str]:
    precision, hardware = config.trainer.precision, config.hardware
    if precision == "16-mixed" and hardware.accelerator == CPU:
        return [
            "trainer.precision = '16-mixed': float16 is for CUDA; a CPU takes auto, 32-true, bf16-mixed or bf16-true"
        ]
    if precision in ("bf16-mixed", "bf16-true") and hardware.accelerator == CUDA and not hardware.bf16:
        return [
            f"trainer.precision = {precision!r}: hardware.bf16 is false for {hardware.name}; take auto, 32-true or"
            " 16-mixed"
        ]
    if precision == "64-true" and config.trainer.strategy == "fsdp2":
        return ["trainer.precision = '64-true': Lightning's fsdp2 has no such precision; take 32-true or ddp"]
    if precision == "bf16-true" and config.trainer.strategy == "fsdp2":
        return [
            "trainer.precision = 'bf16-true': some weights stay float32, which fsdp2 cannot shard with others; take"
            " bf16-mixed or ddp"
        ]
    return []


def _strategy_problems(config: RunConfig) -> list[str]:
    if config.optim.name != "adamw8bit":
        return []
    if config.hardware.accelerator == CPU:
        return ["optim.name = 'adamw8bit': its kernels are for CUDA; a CPU takes adamw, muon, lion or sgd"]
    if config.trainer.strategy == "fsdp2":
        return [
            "optim.name = 'adamw8bit': has no sharded state, which trainer.strategy = 'fsdp2' needs; take optim=adamw"
            " or strategy=ddp"
        ]
    return []


def _text_problems(config: RunConfig) -> list[str]:
    """What a model of text alone can do."""
    callbacks = config.callbacks
    asked = {"callbacks.samples.every": callbacks.samples.every, "callbacks.probes.every": callbacks.probes.every}
    return [
        f"{name} = {value}: is for a model of text, and data.source=synthetic has none; leave it null"
        for name, value in asked.items()
        if value is not None and config.data.source == "synthetic"
    ]


def overridden_sections(overrides: Sequence[str]) -> dict[str, str]:
    """The sections of one kind of layer that ``overrides`` (``a.b=c`` lines) touch: kind to the first override's
    field."""
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
    """One line for each overridden section that changes nothing, because no layer is of its kind."""
    used = kinds_in_use(config.model)
    return [
        f"{key} has no effect: no layer is {kind}"
        for kind, key in overridden_sections(overrides).items()
        if kind not in used
    ]

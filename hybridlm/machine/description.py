"""The machine a run uses: device, precision, and the numbers that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hybridlm.config.hardware import HardwareConfig, precision_problem
from hybridlm.config.run import RunConfig
from hybridlm.config.steps import schedule_problems
from hybridlm.errors import ConfigError
from hybridlm.machine.device import CPU, CUDA, DeviceFacts, cpu_facts, device_facts, limit_memory, take_device
from hybridlm.machine.launcher import Launch, launch, local_rank
from hybridlm.machine.profiles import matrix_tflops, names_card, peak_name, peak_of, profile_of, tf32_allowed


@dataclass(frozen=True)
class Machine:
    """What ``auto`` resolved to. global_batch = batch_size x accumulate x devices, in sequences."""

    device: str  # cpu or cuda
    device_name: str
    devices: int  # processes, over all nodes
    nodes: int
    precision: str
    max_steps: int
    global_batch: int
    batch_size: int
    accumulate: int
    peak_flops: float | None  # of all devices together in this precision, per second; None: unknown
    notes: tuple[str, ...]  # lines to log: a card other than the profile's, the source of the peak


def resolve_machine(config: RunConfig) -> Machine:
    """Chooses device, precision and batch sizes on this machine. Raises ConfigError where the profile needs a device
    that is not available, or numbers contradict each other."""
    hardware, trainer = config.hardware, config.trainer
    refuse_missing_gpu(config, torch.cuda.is_available())
    device, facts = CPU, cpu_facts()
    if hardware.accelerator != CPU and torch.cuda.is_available():
        take_device(local_rank())
        limit_memory(hardware.memory_gb)
        device, facts = CUDA, device_facts()
    per_node, nodes = _processes(trainer.devices, torch.cuda.device_count() if device == CUDA else None, launch())
    devices, precision = per_node * nodes, precision_of(config, facts)
    peak, notes = _peak(hardware, facts, precision)
    global_batch = global_batch_of(config, device, devices)
    batch_size, accumulate = config.batch.complete(global_batch, devices)
    return Machine(
        device=device,
        device_name=facts.name if device == CUDA else f"CPU, {trainer.threads or torch.get_num_threads()} threads",
        devices=devices,
        nodes=nodes,
        precision=precision,
        max_steps=max_steps_of(config, device),
        global_batch=global_batch,
        batch_size=batch_size,
        accumulate=accumulate,
        peak_flops=None if peak is None else peak * 1e12 * devices,
        notes=tuple(notes),
    )


def _peak(hardware: HardwareConfig, facts: DeviceFacts, precision: str) -> tuple[float | None, list[str]]:
    """(TFLOP/s of one device, lines to log): the profile's if it is for this card, else another profile's, else
    measured. On a CPU, whose rate depends on what else is running, only the profile's."""
    name, notes = peak_name(precision, tf32_allowed()), list[str]()
    if name is None:
        return None, notes
    profile: HardwareConfig | None = hardware
    if facts.kind == CUDA and hardware.cards and not names_card(hardware, facts.name):
        limit = "" if hardware.memory_gb is None else f" its memory limit of {hardware.memory_gb:g} GiB applies,"
        notes.append(
            f"hardware={hardware.name} is for another card than {facts.name}:{limit} perf/mfu is relative to this card"
        )
        profile = profile_of(facts.name)
    elif not hardware.cards and peak_of(hardware.peak_tflops, name) is None:
        profile = profile_of(facts.name)
    peak = None if profile is None else peak_of(profile.peak_tflops, name)
    if profile is not None and peak is not None:
        source = f" ({profile.source})" if profile.source else ""
        notes.append(f"peak {peak:g} TFLOP/s in {name}{source}")
    elif facts.kind == CUDA:
        peak = matrix_tflops(torch.device(CUDA), name)
        notes.append(
            f"no profile has the {name} peak of {facts.name}: perf/mfu is relative to {peak:.1f} TFLOP/s, measured"
        )
    return peak, notes


def max_steps_of(config: RunConfig, device: str) -> int:
    """``trainer.max_steps``; if auto, the profile's for ``device``."""
    budget = config.hardware.cuda if device == CUDA else config.hardware.cpu
    return budget.max_steps if config.trainer.max_steps == "auto" else config.trainer.max_steps


def planned_steps(config: RunConfig, facts: DeviceFacts) -> int:
    """``max_steps_of`` a device like ``facts``. Raises ConfigError where the schedule's warm-up and decay do not fit
    into an automatic number."""
    steps = max_steps_of(config, facts.kind)
    if config.trainer.max_steps == "auto" and (
        problems := schedule_problems(config.optim, steps, f" (auto, on {facts.name})")
    ):
        raise ConfigError(problems)
    return steps


def global_batch_of(config: RunConfig, device: str, ranks: int) -> int:
    """Windows of a step over ``ranks`` processes; where ``data.global_batch`` is auto, from the profile's budget for
    ``device``. ConfigError: the numbers do not fit together."""
    budget = config.hardware.cuda if device == CUDA else config.hardware.cpu
    return config.batch.windows_on(ranks, budget.global_batch)


def planned_processes(config: RunConfig, facts: DeviceFacts) -> int:
    """Processes over all nodes on devices like ``facts``, which this machine need not have; one by default."""
    here = facts.kind == CUDA and torch.cuda.is_available()
    return math.prod(_processes(config.trainer.devices, torch.cuda.device_count() if here else None, launch()))


def _processes(asked: int | str, available: int | None, launched: Launch | None) -> tuple[int, int]:
    """(processes per node, nodes). available: devices of this node; None on a CPU, where any number of processes can
    run."""
    per_node = asked if isinstance(asked, int) else launched.per_node if launched else available or 1
    if launched is not None and per_node != launched.per_node:
        raise ConfigError(
            f"trainer.devices = {per_node}: {launched.name} started {launched.per_node} processes per node; set it to"
            " auto"
        )
    if available is not None and per_node > available:
        raise ConfigError(f"trainer.devices = {per_node}: this machine has {available}")
    return per_node, 1 if launched is None else launched.nodes


def precision_of(config: RunConfig, facts: DeviceFacts) -> str:
    """``trainer.precision`` on this device, with auto resolved. Raises ConfigError where it is not supported."""
    bf16, wanted = facts.bf16 and config.hardware.bf16, config.trainer.precision
    if wanted == "auto" and facts.kind == CPU:
        return "32-true"  # bfloat16 is not faster on most CPUs
    if wanted == "auto":
        return "bf16-mixed" if bf16 else "16-mixed"
    card = facts.name if config.hardware.bf16 else f"hardware={config.hardware.name}"
    if (problem := precision_problem(wanted, facts.kind, bf16=bf16, card=card)) is not None:
        raise ConfigError(problem)
    return wanted


def refuse_missing_gpu(config: RunConfig, found: bool) -> None:
    """Raises ConfigError where the profile needs a CUDA device and there is none."""
    if config.hardware.accelerator == CUDA and not found:
        raise ConfigError(
            f"hardware = {config.hardware.name}: needs a CUDA device, and this machine has none; train with"
            " hardware=auto or hardware=cpu (hybridlm plan and --cfg job work anywhere)"
        )

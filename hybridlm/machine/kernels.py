"""Which kernels a run uses: what the configuration asks for, layers and precision allow, and works on this card.

Decided once, before data is prepared. ``auto`` falls back to torch and logs why; a missing kernel that the
configuration requires is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from hybridlm.config.kernels import AUTO, PACKAGES, KernelsConfig
from hybridlm.config.kernels import TORCH as NEVER
from hybridlm.config.layers import LayerSpec
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError
from hybridlm.layers.layer import layer_class
from hybridlm.layers.mixer import Mixer
from hybridlm.machine.description import Machine
from hybridlm.machine.device import CUDA, DeviceFacts, cpu_facts
from hybridlm.machine.profiles import planned_device
from hybridlm.ops.kernels import rules
from hybridlm.ops.kernels.choice import ALL_TORCH, KernelChoice
from hybridlm.ops.kernels.probe import Probe, probe
from hybridlm.ops.kernels.rules import Need, Sizes

Prober = Callable[[str, torch.device, torch.dtype, Sizes | None], Probe]
DTYPES = {  # of activations, by trainer.precision
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "64-true": torch.float64,
}


@dataclass(frozen=True)
class KernelWork:
    """What a run needs of its kernels. documents: packed ones are separated; scale: model.logit_scale."""

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    documents: bool
    scale: float
    sharded: bool = False


def needs(work: KernelWork, card: DeviceFacts) -> list[Need]:
    """The kernels that the layers could use, each once, with the first reason that a layer gives against it and the
    sizes of all."""
    use = rules.KernelUse(work.dtype, work.documents, card.shared_memory_kb)
    every: list[Need] = []
    for spec in dict.fromkeys(layer.params for layer in work.layers):
        every += cast(type[Mixer], layer_class(spec)).kernel_needs(spec, use)
    refusal = rules.loss_refusal(work.dtype, scale=work.scale, sharded=work.sharded)
    found: dict[str, Need] = {}
    for need in (*every, Need("loss", "loss", "linear cross-entropy", refusal)):
        known = found.get(need.field, need)
        sizes = tuple(dict.fromkeys((*known.sizes, *need.sizes)))
        found[need.field] = replace(known, reason=known.reason or need.reason, sizes=sizes)
    return sorted(found.values(), key=lambda need: list(PACKAGES).index(need.setting))


def verdicts(
    work: KernelWork, settings: KernelsConfig, card: DeviceFacts, device: torch.device, prober: Prober = probe
) -> list[Need]:
    """``needs``, with what rules a kernel out here. card: the planned one; device: where the kernels are tried. A
    kernel that the configuration or the layers rule out is not run."""
    found = []
    for need in needs(work, card):
        setting, field = settings.of(need.setting)
        reason: str | None = "needs a CUDA device"
        if setting == NEVER:
            reason = f"{field} = torch"
        elif card.kind == CUDA:
            reason = need.reason or _failure(need.kernel, device, work.dtype, need.sizes, prober)
        found.append(replace(need, reason=reason))
    return found


def _failure(
    kernel: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[Sizes], prober: Prober
) -> str | None:
    """Why the kernel does not run at the first of the sizes where it does not."""
    tried = (prober(kernel, device, dtype, size).reason for size in sizes or (None,))
    return next((reason for reason in tried if reason is not None), None)


def chosen(found: Sequence[Need], dtype: torch.dtype, device: torch.device, prober: Prober = probe) -> KernelChoice:
    """The backends that follow. Where a layer's scan and its convolution are compiled, the layer may run as one
    kernel."""
    used = {verdict.field for verdict in found if verdict.reason is None}
    if "conv" in used:
        whole = [(verdict.whole, verdict.sizes) for verdict in found if verdict.field in used and verdict.whole]
        used |= {field for (field, kernel), sizes in whole if _failure(kernel, device, dtype, sizes, prober) is None}
    return KernelChoice(**dict.fromkeys(used, CUDA))  # type: ignore[arg-type]


def refuse_missing(found: Sequence[Need], settings: KernelsConfig) -> None:
    """Raises ConfigError with a line for each required kernel that is not available."""
    problems = []
    for verdict in found:
        name = verdict.setting
        setting, field = settings.of(name)
        if verdict.reason is not None and setting not in (AUTO, NEVER):
            missing = f"{PACKAGES[name]} " in verdict.reason
            remedy = f"install it (see hybridlm doctor) or use {field}=auto" if missing else ""
            problems.append(
                f"{field} = 'cuda': no compiled kernel for {name} ({verdict.kernel}): {verdict.reason};"
                f" {remedy or f'use kernels.{name}=auto'}"
            )
    if problems:
        raise ConfigError(problems)


def summary(found: Sequence[Need]) -> str:
    """One line: the kernels in use, and why the others are not."""
    used = dict.fromkeys(verdict.kernel for verdict in found if verdict.reason is None)
    missed = "; ".join(f"{verdict.kernel}: {verdict.reason}" for verdict in found if verdict.reason is not None)
    return f"{', '.join(used) or 'torch only'}" + (f" (torch for {missed})" if missed else "")


def choose_kernels(config: RunConfig, machine: Machine, say: Callable[[str], None]) -> KernelChoice:
    """The kernels of a training run, reported to ``say`` in one line where there is a CUDA device. ConfigError: a
    required one is not available."""
    work = KernelWork(
        layers=config.model.layers,
        dtype=DTYPES[machine.precision],
        documents=config.data.packing and config.data.isolate,
        scale=config.model.logit_scale,
        sharded=config.trainer.strategy == "fsdp2",
    )
    card = planned_device(config.hardware) if machine.device == CUDA else cpu_facts()
    device = torch.device(machine.device)
    found = verdicts(work, config.kernels, card, device)
    refuse_missing(found, config.kernels)
    if machine.device != CUDA:
        return ALL_TORCH
    say(summary(found))
    return chosen(found, work.dtype, device)

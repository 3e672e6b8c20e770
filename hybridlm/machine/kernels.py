"""Which kernels a run uses: what the configuration asks for, what the layers and the precision allow, what works on
this card.

Decided once, before data is prepared. ``auto`` falls back to torch and says why; a kernel that is asked for and cannot
be had is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from hybridlm.config.kernels import AUTO, KINDS, KernelsConfig
from hybridlm.config.kernels import TORCH as NEVER
from hybridlm.config.layers import LayerSpec, Mamba1Spec, Mamba2Spec, Mamba3Spec
from hybridlm.config.resolve import resolve_layers
from hybridlm.errors import ConfigError
from hybridlm.machine.device import CUDA, DeviceFacts, cpu_facts
from hybridlm.machine.profiles import planned_device
from hybridlm.ops.kernels import rules
from hybridlm.ops.kernels.choice import ALL_TORCH, KernelChoice
from hybridlm.ops.kernels.probe import Probe, probe
from hybridlm.ops.kernels.trials import Sizes

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig
    from hybridlm.machine.description import Machine

Prober = Callable[[str, torch.device, torch.dtype, Sizes | None], Probe]
DTYPES = {  # of activations, by trainer.precision
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "64-true": torch.float64,
}
INSTALL = {
    "conv": "causal-conv1d",
    "mamba1": "mamba-ssm",
    "mamba2": "mamba-ssm",
    "mamba3": "mamba-ssm",
    "loss": "liger-kernel",
}


@dataclass(frozen=True)
class Work:
    """What the kernels of a run have to do. documents: layers tell documents apart; scale: model.logit_scale."""

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    documents: bool
    scale: float
    sharded: bool = False


@dataclass(frozen=True)
class Need:
    """One kernel that a kind of layer can use. field: of KernelChoice; refusal: the layers' own reason against it;
    sizes: of the layers, where the kernel is compiled for their widths, so that it may work at some and not at
    others."""

    kind: str
    field: str
    kernel: str
    refusal: str | None
    sizes: tuple[Sizes, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Of one kernel: used, or the reason why not. sizes: as of ``Need``."""

    kind: str
    field: str
    kernel: str
    reason: str | None
    sizes: tuple[Sizes, ...]


def needs(work: Work, card: DeviceFacts) -> list[Need]:
    """The kernels that the layers could use, each once, with the first reason that a layer gives against it and the
    sizes of all."""
    found: dict[str, Need] = {}
    for need in _needs(work, card):
        known = found.get(need.field, need)
        sizes = tuple(dict.fromkeys((*known.sizes, *need.sizes)))
        found[need.field] = replace(known, refusal=known.refusal or need.refusal, sizes=sizes)
    return sorted(found.values(), key=lambda need: KINDS.index(need.kind))


def _needs(work: Work, card: DeviceFacts) -> Iterable[Need]:
    dtype = work.dtype
    for spec in dict.fromkeys(layer.params for layer in work.layers):
        if isinstance(spec, Mamba1Spec):
            yield Need("conv", "conv", "causal-conv1d", rules.conv_refusal(spec.d_inner, spec.d_conv, dtype))
            yield Need(
                "mamba1",
                "mamba1",
                "selective scan",
                rules.mamba1_refusal(spec.d_state, dtype, documents=work.documents),
            )
        elif isinstance(spec, Mamba2Spec):
            yield Need("conv", "conv", "causal-conv1d", rules.conv_refusal(spec.conv_channels, spec.d_conv, dtype))
            sizes = Sizes(head_dim=spec.head_dim, d_state=spec.d_state, width=spec.d_conv)
            yield Need("mamba2", "mamba2", "SSD scan", rules.mamba2_refusal(spec.d_state, dtype), (sizes,))
        elif isinstance(spec, Mamba3Spec):
            if spec.use_conv:
                yield Need("conv", "conv", "causal-conv1d", rules.conv_refusal(spec.conv_channels, spec.d_conv, dtype))
            yield _mamba3(spec, dtype, card)
    yield Need(
        "loss", "loss", "linear cross-entropy", rules.loss_refusal(dtype, scale=work.scale, sharded=work.sharded)
    )


def _mamba3(spec: Mamba3Spec, dtype: torch.dtype, card: DeviceFacts) -> Need:
    widths = (spec.d_state, spec.head_dim)
    refusal = rules.mamba3_refusal(*widths, spec.n_angles, dtype, trapezoidal=spec.trapezoidal)
    sizes = Sizes(head_dim=spec.head_dim, d_state=spec.d_state, rank=spec.rank, angles=spec.n_angles)
    if spec.mimo_rank is None:
        return Need("mamba3", "mamba3_siso", "Mamba-3 SISO", refusal, (sizes,))
    shared, gated = card.shared_memory_kb, not spec.outproj_norm
    grouped = {"heads": spec.n_heads, "groups": spec.n_groups}
    refusal = refusal or rules.mimo_refusal(
        *widths, spec.mimo_rank, spec.n_angles, **grouped, gated=gated, shared_memory_kb=shared
    )
    return Need("mamba3", "mamba3_mimo", "Mamba-3 MIMO", refusal, (sizes,))


def verdicts(
    work: Work, settings: KernelsConfig, card: DeviceFacts, device: torch.device, prober: Prober = probe
) -> list[Verdict]:
    """Of every kernel that the layers could use. card: what is planned for; device: where the kernels are run to see. A
    kernel that the configuration or the layers rule out is not run."""
    found = []
    for need in needs(work, card):
        setting, field = settings.of(need.kind)
        if setting == NEVER:
            reason: str | None = f"{field} = torch"
        elif card.kind != CUDA:
            reason = "needs a CUDA device"
        else:
            reason = need.refusal or _failure(need.kernel, device, work.dtype, need.sizes, prober)
        found.append(Verdict(need.kind, need.field, need.kernel, reason, need.sizes))
    return found


def _failure(
    kernel: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[Sizes], prober: Prober
) -> str | None:
    """Why the kernel does not run at the first of the sizes where it does not."""
    tried = (prober(kernel, device, dtype, size).reason for size in sizes or (None,))
    return next((reason for reason in tried if reason is not None), None)


def chosen(found: Sequence[Verdict], dtype: torch.dtype, device: torch.device, prober: Prober = probe) -> KernelChoice:
    """The backends that follow. Where both the convolution and Mamba-2's scan are compiled, a Mamba-2 layer may run as
    one kernel."""
    used = {verdict.field: verdict.sizes for verdict in found if verdict.reason is None}
    if {"conv", "mamba2"} <= set(used) and _failure("Mamba-2 layer", device, dtype, used["mamba2"], prober) is None:
        used["mamba2_layer"] = used["mamba2"]
    return KernelChoice(**dict.fromkeys(used, CUDA))  # type: ignore[arg-type]


def refuse_missing(found: Sequence[Verdict], settings: KernelsConfig) -> None:
    """Raise ConfigError with a line for each kernel that is asked for and cannot be had."""
    problems = []
    for verdict in found:
        setting, field = settings.of(verdict.kind)
        if verdict.reason is not None and setting not in (AUTO, NEVER):
            package = INSTALL[verdict.kind]
            install = (
                f"; install it (hybridlm doctor says how) or take {field}=auto"
                if f"{package} " in verdict.reason
                else ""
            )
            install = install or f"; take kernels.{verdict.kind}=auto"
            problems.append(
                f"{field} = 'cuda': no compiled kernel for {verdict.kind} ({verdict.kernel}): {verdict.reason}{install}"
            )
    if problems:
        raise ConfigError(problems)


def told(found: Sequence[Verdict]) -> str:
    """One line: what is used, and why not what is not."""
    used = dict.fromkeys(verdict.kernel for verdict in found if verdict.reason is None)
    missed = "; ".join(f"{verdict.kernel}: {verdict.reason}" for verdict in found if verdict.reason is not None)
    return f"{', '.join(used) or 'torch only'}" + (f" (torch for {missed})" if missed else "")


def choose_kernels(config: RunConfig, machine: Machine, say: Callable[[str], None]) -> KernelChoice:
    """The kernels of a training run, in a line to ``say`` where there is a CUDA device. ConfigError: one is asked for
    and not to be had."""
    work = Work(
        layers=resolve_layers(config.model),
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
    say(told(found))
    return chosen(found, work.dtype, device)

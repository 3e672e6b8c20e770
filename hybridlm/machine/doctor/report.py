"""What `hybridlm doctor` prints: four tables, or the same as JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, astuple, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from hybridlm.config.kernels import KernelsConfig
from hybridlm.config.layers import LayerSpec, Spec
from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig
from hybridlm.machine.device import CUDA, DeviceFacts, device_facts, inference_device
from hybridlm.machine.doctor.advice import Line, advice
from hybridlm.machine.doctor.stack import OPTIONAL, Stack, stack_here
from hybridlm.machine.kernels import KernelWork, needs, verdicts
from hybridlm.machine.limits import system_bytes
from hybridlm.ops.kernels.probe import KERNELS, Probe, package_version, probe

NO_CARD = "needs a CUDA device"


@dataclass(frozen=True)
class Choice:
    """What `kernels=auto` uses for a kind of layer, and why not another kernel."""

    kind: str
    takes: str
    why_not: str | None


@dataclass(frozen=True)
class Findings:
    """All that doctor finds, as plain values for JSON."""

    stack: Stack
    card: DeviceFacts
    cards: int
    cores: int | None
    memory_gib: float | None
    kernels: list[Probe]
    choices: list[Choice]
    advice: list[Line]


def examine(stack: Stack, card: DeviceFacts, device: torch.device, cards: int) -> Findings:
    """Runs every kernel on ``device`` if ``card`` is a CUDA one. Does not raise for missing or broken packages."""
    dtype, memory = torch.bfloat16 if card.bf16 else torch.float16, system_bytes()
    kernels = [_probed(name, card, device, dtype) for name in KERNELS]
    stack = replace(stack, broken=_broken(stack, card, kernels))
    return Findings(
        stack=stack,
        card=card,
        cards=cards,
        cores=os.cpu_count(),
        memory_gib=None if memory is None else memory / 2**30,
        kernels=kernels,
        choices=_choices(card, device, dtype, {found.name: found.ok for found in kernels}),
        advice=advice(stack),
    )


def _probed(name: str, card: DeviceFacts, device: torch.device, dtype: torch.dtype) -> Probe:
    if card.kind == CUDA:
        return probe(name, device, dtype)
    return Probe(name, False, NO_CARD, 0.0, package_version(KERNELS[name].package or "torch"))


def _broken(stack: Stack, card: DeviceFacts, kernels: list[Probe]) -> tuple[str, ...]:
    """The installed packages without a working kernel."""
    working = {KERNELS[found.name].package for found in kernels if found.ok}
    asked = dict.fromkeys(KERNELS[found.name].package for found in kernels if card.kind == CUDA)
    return tuple(name for name in asked if name in stack.packages and name not in working)


def _choices(card: DeviceFacts, device: torch.device, dtype: torch.dtype, works: dict[str, bool]) -> list[Choice]:
    """For each kind of layer at its defaults, in the 16-bit precision of trainer.precision=auto on this card."""
    attention = [kind for kind in ("flash", "efficient") if works[f"{kind} attention"]]
    found: dict[str, Choice] = {}
    plain = []
    for kind, spec in _every_kind().items():
        layer = (LayerSpec(kind, spec, "none", None),)
        chosen = verdicts(KernelWork(layer, dtype, documents=False, scale=1.0), KernelsConfig(), card, device)
        packed = {need.field: need.reason for need in needs(KernelWork(layer, dtype, documents=True, scale=1.0), card)}
        for need in chosen:
            name = {"conv": "short convolution", "loss": "head and loss"}.get(need.setting, kind)
            takes = need.whole[1] if need.whole and works[need.whole[1]] else need.kernel
            note = f"{need.kernel}: {need.reason}"
            if need.reason is None:
                note = f"torch for packed documents: {packed[need.field]}" if packed[need.field] else ""
            found[name] = Choice(name, "torch" if need.reason else takes, note or None)
        if len(chosen) == 1:  # the loss, which every model has
            plain.append(kind)
    takes = f"torch, attention by SDPA ({' or '.join([*attention, 'math'])})" if card.kind == CUDA else "torch"
    return [Choice(", ".join(plain), takes, None), *found.values()]


def _every_kind() -> dict[str, Spec]:
    """Each kind of mixer at the defaults, and in its other forms."""
    model = ModelConfig()
    specs = {kind: mixer().resolve(model, "") for kind, mixer in MIXERS.items()}
    for kind, mixer in MIXERS.items():
        specs |= {
            f"{kind} with {', '.join(form)}": mixer.model_validate(form).resolve(model, "") for form in mixer.forms
        }
    return specs


def run_doctor(*, as_json: bool) -> None:
    """Prints the findings for this machine."""
    card = device_facts()
    cards = torch.cuda.device_count() if card.kind == CUDA else 0
    findings = examine(stack_here(card), card, inference_device(), cards)
    if as_json:
        print(json.dumps(asdict(findings), indent=2))
    else:
        show(findings, Console())


def show(findings: Findings, console: Console) -> None:
    """Prints the findings as tables, then what to install."""
    packages = findings.stack.packages
    for header, rows in (
        (("machine", ""), _machine(findings)),
        (("kernel", "version", "works", "time", "why not"), [_row(found) for found in findings.kernels]),
        (("layer", "kernels=auto uses", "why not another"), [astuple(choice) for choice in findings.choices]),
        (("optional package", "version"), [(name, packages.get(name, "not installed")) for name in OPTIONAL]),
    ):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in header:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, "")
    console.print("[bold]to install[/bold]" if findings.advice else "nothing to install")
    for line in findings.advice:
        console.print(f"  {line.package}: {line.gives}", highlight=False)
        for text in filter(None, (line.note, line.command)):
            console.print(f"    {text}", highlight=False, soft_wrap=True, markup=False)


def _machine(findings: Findings) -> list[tuple[str, str]]:
    stack, card = findings.stack, findings.card
    memory = "unknown" if findings.memory_gib is None else f"{findings.memory_gib:.1f} GiB"
    gpu = "none"
    if card.kind == CUDA:
        shared = "" if card.shared_memory_kb is None else f", {card.shared_memory_kb} KiB of shared memory per block"
        size = "" if card.memory_gb is None else f", {card.memory_gb:.1f} GiB"
        bf16 = "bfloat16" if card.bf16 else "no bfloat16"
        gpu = f"{findings.cards} x {card.name}, compute capability {card.capability}{size}{shared}, {bf16}"
    built = "CPU build" if stack.torch_cuda is None else f"built for CUDA {stack.torch_cuda}"
    return [
        ("system", f"{stack.system} {platform.machine()}, {findings.cores} cores, {memory}"),
        ("Python", stack.python),
        ("torch", f"{stack.torch}, {built}"),
        ("NVIDIA driver", stack.driver or "not found"),
        ("nvcc", stack.nvcc or "not found"),
        ("card", gpu),
    ]


def _row(found: Probe) -> tuple[str, ...]:
    seconds = f"{found.seconds:.1f} s" if found.seconds else ""
    return found.name, found.version or "", "yes" if found.ok else "no", seconds, found.reason or ""

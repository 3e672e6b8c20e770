"""The hardware section: the machine a run is planned for. The facts of the actual machine come from
hybridlm/machine/."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from hybridlm.config.section import Section, Strings

Accelerator = Literal["auto", "cpu", "cuda"]
AUTO, CPU, CUDA = get_args(Accelerator)


def _version(value: object) -> object:
    """8.6 in YAML or on a command line is a number; text is meant."""
    return f"{value:.1f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Capability = Annotated[str, BeforeValidator(_version)]


class Budget(Section):
    """What ``auto`` means for the two numbers that depend on the machine."""

    global_batch: int = Field(16, ge=1, description="data.global_batch if that is auto")
    max_steps: int = Field(1000, ge=1, description="trainer.max_steps if that is auto")


class Peaks(Section):
    """Peak TFLOP/s of one device in dense matrix products (16-bit ones accumulate in fp32); perf/mfu uses
    that of the run's precision."""

    fp32: float | None = Field(None, gt=0, description="without tensor cores; for trainer.precision=32-true")
    tf32: float | None = Field(None, gt=0, description="for 32-true if torch may use TF32 for fp32 products")
    fp16: float | None = Field(None, gt=0, description="for 16-mixed")
    bf16: float | None = Field(None, gt=0, description="for bf16-mixed and bf16-true")


class HardwareConfig(Section):
    """A hardware profile (``hardware``)."""

    name: str = Field("auto", description="set by hardware=...: the profile")
    accelerator: Accelerator = Field("auto", description="auto: the GPU if there is one")
    cards: Strings = Field((), description="the driver's names of the cards these numbers apply to; []: any card")
    memory_gb: float | None = Field(
        None, gt=0, description="device memory (GiB) that the run may use, also on a larger card; null: all of it"
    )
    compute_capability: Capability | None = Field(
        None, description="CUDA compute capability, such as 8.6; null: the card's"
    )
    bf16: bool = Field(True, description="whether the card supports bfloat16, for trainer.precision=auto")
    shared_memory_kb: int | None = Field(
        None, ge=1, description="maximum shared memory (KiB) of a kernel block; null: the card's"
    )
    peak_tflops: Peaks = Peaks()
    bandwidth_gb_s: float | None = Field(None, gt=0, description="memory bandwidth, 1e9 bytes per second")
    source: str = Field("", description="source of the peaks and the bandwidth, and the clock speed")
    cpu: Budget = Budget()
    cuda: Budget = Budget()


def precision_problem(precision: str, device: str, *, bf16: bool, card: str) -> str | None:
    """One line where ``device`` (cpu, cuda, or auto: not known yet) cannot train in ``precision``. bf16: whether the
    card computes in bfloat16."""
    if precision == "16-mixed" and device == CPU:
        return "trainer.precision = '16-mixed': float16 needs CUDA; use auto, 32-true, bf16-mixed or bf16-true"
    if precision in ("bf16-mixed", "bf16-true") and device == CUDA and not bf16:
        return f"trainer.precision = {precision!r}: {card} has no bfloat16; use auto, 32-true or 16-mixed"
    return None


def optimizer_problem(optimizer: str, device: str) -> str | None:
    """One line where ``device`` has no kernels for the optimizer ``optim.name``."""
    if optimizer == "adamw8bit" and device == CPU:
        return "optim.name = 'adamw8bit': its kernels need CUDA; use adamw, muon, lion or sgd"
    return None

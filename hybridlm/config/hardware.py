"""The hardware section: which machine the run is planned for. The facts of the machine itself come from
hybridlm/machine/."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from hybridlm.config.section import Section, Strings

Accelerator = Literal["auto", "cpu", "cuda"]
AUTO, CPU, CUDA = get_args(Accelerator)


def _version(value: object) -> object:
    """8.6 of YAML or a command line is a number; what is meant is text."""
    return f"{value:.1f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Capability = Annotated[str, BeforeValidator(_version)]


class Budget(Section):
    """What ``auto`` means for the two numbers that grow with the machine."""

    global_batch: int = Field(16, ge=1, description="data.global_batch where that is auto")
    max_steps: int = Field(1000, ge=1, description="trainer.max_steps where that is auto")


class Peaks(Section):
    """TFLOP/s of one device in matrix products: dense, 16-bit products summed in fp32; perf/mfu is a share of one of
    them."""

    fp32: float | None = Field(None, gt=0, description="without tensor cores; of trainer.precision=32-true")
    tf32: float | None = Field(None, gt=0, description="of 32-true where torch may round products of fp32 to TF32")
    fp16: float | None = Field(None, gt=0, description="of 16-mixed")
    bf16: float | None = Field(None, gt=0, description="of bf16-mixed and bf16-true")


class HardwareConfig(Section):
    """A hardware profile (``hardware``)."""

    name: str = Field("auto", description="set by hardware=...: the profile")
    accelerator: Accelerator = Field("auto", description="auto: the GPU if there is one")
    cards: Strings = Field(
        (), description="the driver's names of the cards that the numbers below are of; []: of whatever card there is"
    )
    memory_gb: float | None = Field(
        None, gt=0, description="device memory (GiB) the run may use, also on a larger card; null: all of it"
    )
    compute_capability: Capability | None = Field(None, description="of CUDA, as 8.6; null: the card's")
    bf16: bool = Field(True, description="whether the card computes in bfloat16; trainer.precision=auto reads it")
    shared_memory_kb: int | None = Field(
        None, ge=1, description="the most (KiB) that one block of a kernel may have; null: the card's"
    )
    peak_tflops: Peaks = Peaks()
    bandwidth_gb_s: float | None = Field(None, gt=0, description="of the device's memory, 1e9 bytes per second")
    source: str = Field("", description="where the peaks and the bandwidth are from, at which clock")
    cpu: Budget = Budget()
    cuda: Budget = Budget()

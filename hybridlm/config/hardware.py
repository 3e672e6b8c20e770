"""The hardware section: which machine the run is planned for. The facts of the machine itself come from hybridlm/hardware.py."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from hybridlm.config.section import Section

Accelerator = Literal["auto", "cpu", "cuda"]
AUTO, CPU, CUDA = get_args(Accelerator)


class Budget(Section):
    """What ``auto`` means for the two numbers that grow with the machine."""

    global_batch: int = Field(16, ge=1, description="data.global_batch where that is auto")
    max_steps: int = Field(1000, ge=1, description="trainer.max_steps where that is auto")


class HardwareConfig(Section):
    """A hardware profile (``hardware``)."""

    name: str = "auto"
    accelerator: Accelerator = Field("auto", description="auto: the GPU if there is one")
    memory_gb: float | None = Field(None, gt=0, description="device memory (GiB) the run may use, also on a larger card; null: all of it")
    bf16: bool = Field(True, description="whether the card computes in bfloat16; trainer.precision=auto reads it")
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="matrix-product TFLOP/s of one device in the precision of training, for perf/mfu; null: no perf/mfu",
    )
    cpu: Budget = Budget()
    cuda: Budget = Budget()

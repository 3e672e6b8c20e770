"""What a kind of device can do. Asked of the device that a profile names before a run, and of the actual one when a run
starts."""

from __future__ import annotations

from hybridlm.config.hardware import CPU, CUDA


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

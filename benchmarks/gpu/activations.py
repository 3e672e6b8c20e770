"""Memory of the activations of a training step: the hybrid against all attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu.models import ALL_ATTENTION, HYBRID, ours
from gpu.part import Bar, Part, Row, pick
from gpu.setting import Setting, peak_of_call
from gpu.step import TrainStep

CONTEXTS = (1024, 4096, 16384)
TOKENS = 16384


def activations(setting: Setting, name: str, shape: tuple[int, int]) -> int:
    """Bytes that forward and backward need above weights, gradients and optimizer state at their peak."""
    step = TrainStep(setting, ours(setting, name), shape)
    step()  # gradients and optimizer state are there from now on
    step.optimizer.zero_grad(set_to_none=False)
    held = torch.cuda.memory_allocated() if setting.on_gpu else 0

    def backward() -> None:
        with torch.autocast(setting.device.type, setting.dtype):
            output = step.model(step.ids, targets=step.targets)
        (output.loss_sum / step.ids.numel()).backward()

    return peak_of_call(setting, backward)[0] - held


def _measure(setting: Setting, case: str) -> Iterator[Row]:
    context = int(case.removeprefix("T = "))
    tokens = TOKENS if setting.memory_gb >= 22 else context
    shape = (1 if setting.dry else max(1, tokens // context), setting.length(context))
    sizes = {}
    for name in (ALL_ATTENTION, HYBRID):
        sizes[name] = activations(setting, name, shape)
        setting.release()
    yield {
        "case": case,
        "batch": shape[0],
        **{f"{name}, MB": size / 1e6 for name, size in sizes.items()},
        "ratio": sizes[HYBRID] / sizes[ALL_ATTENTION],
    }


PART = Part(
    "activations",
    "memory of the activations of a training step at d12, eager, no block computed again: hybrid 3:1 against all"
    " attention",
    60,
    lambda setting: [f"T = {context}" for context in setting.contexts(*CONTEXTS)],
    _measure,
    [
        Bar(
            f"activation memory, hybrid 3:1 against all attention, T = {context}",
            "-",
            None,
            lambda rows, context=context: pick(rows, "ratio", {"case": f"T = {context}"}),
        )
        for context in CONTEXTS
    ],
)

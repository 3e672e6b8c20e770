"""Training throughput and MFU by order of layers and context, eager and compiled, and the bars on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from gpu.models import ALL_ATTENTION, HYBRID, PATTERNS, ours
from gpu.part import Bar, Part, Row, at_least, pick
from gpu.setting import Setting
from gpu.step import TrainStep, rate
from harness.turns import take_turns

from hybridlm.ops.kernels.choice import ALL_TORCH
from hybridlm.train.compiled import compile_blocks

CONTEXTS = (1024, 2048, 4096, 8192, 16384)
COMPILED_CONTEXTS = (2048, 8192)
TORCH_CONTEXT = 4096  # where what the compiled kernels are worth is seen
TOKENS = 16384  # of a step
CASE_SECONDS = 30  # of the rounds of a case


def compiling(setting: Setting) -> AbstractContextManager[object]:
    """Blocks that compile themselves; in a dry run they run as they are written, which spares minutes."""
    return torch.compiler.set_stance("force_eager") if setting.dry else nullcontext()


def _shape(setting: Setting, context: int) -> tuple[int, int]:
    tokens = TOKENS if setting.memory_gb >= 22 else 8192 if setting.memory_gb >= 14 else 4096
    return max(1, tokens // context), setting.length(context)


def _cases(setting: Setting) -> list[str]:
    eager = [f"eager {context}" for context in setting.contexts(*CONTEXTS)]
    return [
        "mfu d12",  # first what bars hang on
        "mfu d20",
        *eager,
        f"torch {TORCH_CONTEXT}",
        *(f"compiled {context}" for context in setting.contexts(*COMPILED_CONTEXTS)),
    ]


def _measure(setting: Setting, case: str) -> Iterator[Row]:
    mode, of = case.split()
    torch.compiler.reset()  # else a second context would be compiled for changing lengths
    if mode == "mfu":
        yield from _transformer(setting, of)
        return
    names = [ALL_ATTENTION, "Mamba-2", HYBRID] if mode == "compiled" else list(PATTERNS)
    steps = {}
    for name in names:
        model = ours(setting, name)
        if mode == "compiled":
            compile_blocks(model)
        elif mode == "torch":
            model.kernels = ALL_TORCH
        steps[name] = TrainStep(setting, model, _shape(setting, int(of)))
    with compiling(setting) if mode == "compiled" else nullcontext():
        for step in steps.values():
            step()  # compiles, and warms allocators and kernels up
        times = take_turns(steps, setting.affordable(steps, CASE_SECONDS))
    for name, step in steps.items():
        ratio = {} if name == ALL_ATTENTION else {"over all attention": times.ratio(ALL_ATTENTION, name).median}
        yield {
            "case": case,
            "model": name,
            "context": int(of),
            "mode": mode,
            **rate(setting, step, times, name),
            **ratio,
        }


def _transformer(setting: Setting, size: str) -> Iterator[Row]:
    """All attention, compiled, at a batch that fills the card."""
    batch = 16 if setting.memory_gb >= 38 else 4
    model = ours(setting, ALL_ATTENTION, size)
    compile_blocks(model)
    step = TrainStep(setting, model, (batch, setting.length(2048)))
    with compiling(setting):
        step()
        times = take_turns({"it": step}, setting.affordable({"it": step}, CASE_SECONDS))
    row = rate(setting, step, times, "it")
    yield {
        "case": f"mfu {size}",
        "model": f"{ALL_ATTENTION}, {size}",
        "context": 2048,
        "mode": "compiled",
        **row,
        "batch": batch,
    }


def _over_attention(context: int) -> Bar:
    bound = {4096: 1.1, 8192: 1.3, 16384: 1.8}[context]
    return Bar(
        f"hybrid 3:1 against all attention, training tokens/s at T = {context}",
        f">= {bound}x",
        at_least(bound),
        lambda rows: pick(rows, "over all attention", {"model": HYBRID, "context": context, "mode": "eager"}),
    )


def _mfu(size: str, bound: float) -> Bar:
    return Bar(
        f"transformer training MFU of the dense 16-bit peak, compiled, {size}",
        f">= {bound:.0%}",
        at_least(bound),
        lambda rows: pick(rows, "mfu", {"case": f"mfu {size}"}),
        unit="%",
    )


def crossover(rows: Sequence[Row]) -> str:
    """One line: the context from which the hybrid trains faster than all attention."""
    found = {
        int(row["context"]): float(row["over all attention"])  # type: ignore[call-overload,arg-type]
        for row in rows
        if row.get("model") == HYBRID and row.get("mode") == "eager" and "over all attention" in row
    }
    if not found:
        return "The context from which the hybrid trains faster: not measured."
    faster = [
        context
        for context, ratio in sorted(found.items())
        if all(found[longer] >= 1 for longer in found if longer >= context)
    ]
    said = f"from T = {faster[0]} on" if faster else f"at no context up to {max(found)}"
    ratios = ", ".join(f"{ratio:.2f}x at {context}" for context, ratio in sorted(found.items()))
    return f"The hybrid trains faster than all attention {said} ({ratios}; eager)."


PART = Part(
    "throughput",
    "training tokens/s and MFU: six orders of layers at d12 in turn, contexts 1k to 16k, eager with the kernels of"
    " kernels=auto, and at 4k without (torch); three of them, and a transformer at d12 and d20, compiled",
    400,
    _cases,
    _measure,
    [*(_over_attention(context) for context in (4096, 8192, 16384)), _mfu("d12", 0.38), _mfu("d20", 0.45)],
)

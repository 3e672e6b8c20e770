"""Planned against measured memory of training: every preset that fits the card, and presets of small cards with the
allocator capped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from gpu.models import kernels_of, with_kernels
from gpu.part import Bar, Part, Row, at_least, at_most, pick
from gpu.setting import Setting, peak_of_call
from harness.turns import LeftOut
from torch import Tensor

from hybridlm.cli.compose import compose_config
from hybridlm.config.groups import groups
from hybridlm.config.run import RunConfig
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.machine.device import limit_memory
from hybridlm.memory.plan import Plan, plan_run
from hybridlm.model.build import fresh_model
from hybridlm.model.lm import HybridLM
from hybridlm.ops.kernels.choice import TORCH
from hybridlm.optim.optimizer import HybridOptimizer, model_groups

# GiB that the allocator may have: what is trained on such cards today.
CAPPED = {
    8: ("transformer d12 512", "mamba2 d12 1024", "hybrid_alternating d16 1024", "slm_100m default 1024"),
    12: ("transformer d16 1024", "mamba2 d16 1024", "hybrid_alternating d20 1024"),
    16: ("transformer d20 2048", "mamba3 d20 2048", "hybrid_alternating d20 2048"),
    24: ("transformer d26 2048", "mamba2 d26 2048", "hybrid_alternating d26 2048"),
}
WITHIN = 0.08
SLM, SLM_CAP_GB, SLM_PEAK_GB, SLM_INFERENCE_GB = "slm_100m", 8, 6.0, 1.0


def configured(setting: Setting, preset: str, size: str, context: str, cap: str) -> RunConfig:
    overrides = [f"model={preset}", f"size={'tiny' if setting.dry else size}", "trainer.devices=1"]
    overrides += (
        ["hardware=cpu", "data.seq_len=16"] if setting.dry else [f"data.seq_len={context}"] if context != "-" else []
    )
    return compose_config(overrides + ([f"hardware.memory_gb={cap}"] if cap != "all" and not setting.dry else []))


class PlannedStep:
    """A step as the trainer makes it, of the plan's micro-batch and with its optimizer, on random ids."""

    def __init__(self, setting: Setting, config: RunConfig, plan: Plan) -> None:
        vocab = plan.vocabulary.ids
        self.setting, self.plan = setting, plan
        self.model: HybridLM = fresh_model(config.model, vocab, seed=0, device=setting.device).train()
        self.model.checkpoint_blocks, self.model.loss_rows = plan.checkpoint_blocks, plan.loss_rows
        self.optimizer = HybridOptimizer(model_groups(self.model, config.optim), config.optim)
        self.ids = torch.randint(vocab, (plan.batch_size, config.data.seq_len)).to(setting.device)

    def loss(self) -> Tensor:
        with torch.autocast(self.setting.device.type, self.setting.dtype, enabled=self.setting.on_gpu):
            output = self.model(self.ids, targets=self.ids)
        mean: Tensor = output.loss_sum / self.ids.numel()
        return mean if output.aux is None else mean + output.aux

    def held_bytes(self) -> int:
        """Of weights and optimizer state."""
        moments = (
            tensor for state in self.optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)
        )
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *moments))

    def __call__(self) -> None:
        """In the trainer's order: the gradients of the step before are there until the first backward."""
        for micro_batch in range(min(2, self.plan.accumulate)):
            loss = self.loss()
            if micro_batch == 0:
                self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    def peak(self) -> tuple[int, int]:
        """(bytes allocated at most, bytes reserved at most) of a step that has steps before it."""
        self()
        self.optimizer.zero_grad()
        held = 0 if self.setting.on_gpu else self.held_bytes()  # a CPU's peak is above what was there
        allocated, reserved = peak_of_call(self.setting, lambda: [self(), self()])
        return allocated + held, reserved + held


def _cases(setting: Setting) -> list[str]:
    """What the small cards' runs show is wanted most, and nano presets least, should the time end."""
    presets = [
        f"{preset} default - all" for preset in sorted(groups()["model"], key=lambda preset: preset.startswith("nano"))
    ]
    capped = [f"{run} {cap}" for cap, runs in CAPPED.items() if cap <= setting.memory_gb for run in runs]
    return capped[:1] + presets[:2] if setting.dry else capped + presets


def _measure(setting: Setting, case: str) -> Iterator[Row]:
    preset, size, context, cap = case.split()
    config = configured(setting, preset, size, context, cap)
    plan = plan_run(config)
    if not plan.fits:
        raise LeftOut("the plan says that it does not fit")
    if setting.on_gpu:
        limit_memory(config.hardware.memory_gb)
    step = PlannedStep(setting, config, plan)
    allocated, reserved = step.peak()
    yield {
        "case": case,
        "batch": plan.batch_size,
        "accumulate": plan.accumulate,
        "checkpoint_blocks": plan.checkpoint_blocks,
        "loss_rows": plan.loss_rows,
        "planned_mb": plan.peak.bytes / 1e6,
        "allocated_mb": allocated / 1e6,
        "planned / allocated": plan.peak.bytes / allocated,
        "with_margin_mb": plan.reserved_bytes / 1e6,
        "reserved_mb": reserved / 1e6,
        "with margin / reserved": plan.reserved_bytes / reserved,
    }
    step.model = with_kernels(setting, step.model)  # in a row of its own: what fails here takes no other number with it
    compiled, _ = step.peak()
    yield {
        "case": case,
        "kernels": kernels_of(step.model),
        "allocated_with_kernels_mb": compiled / 1e6,
        "planned / allocated with kernels": plan.peak.bytes / compiled,
    }


def _over_kernels(rows: Sequence[Row]) -> float | None:
    key = "planned / allocated with kernels"
    found = [float(row[key]) for row in rows if key in row and row["kernels"] != TORCH]  # type: ignore[arg-type]
    return min(found) if found else None


def _worst(rows: Sequence[Row]) -> float | None:
    off = [abs(float(row["planned / allocated"]) - 1) for row in rows if "planned / allocated" in row]  # type: ignore[arg-type]
    return max(off) if off else None


def _least(rows: Sequence[Row]) -> float | None:
    found = [float(row["with margin / reserved"]) for row in rows if "with margin / reserved" in row]  # type: ignore[arg-type]
    return min(found) if found else None


MEMORY = Part(
    "memory",
    "planned against measured memory of a training step: every preset that fits, and runs of small cards with the"
    " allocator capped at 8, 12, 16 and 24 GiB; a fresh process each. A plan is of the torch path, so the bars"
    " are, too",
    480,
    _cases,
    _measure,
    [
        Bar(
            "plan without margin against max_memory_allocated, the worst run",
            f"within {WITHIN:.0%}",
            at_most(WITHIN),
            _worst,
            unit="%",
        ),
        Bar("plan with margin over max_memory_reserved, the worst run", ">= 1x", at_least(1.0), _least),
        Bar(
            "plan without margin over max_memory_allocated with the compiled kernels, the worst run",
            "-",
            None,
            _over_kernels,
        ),
    ],
    fresh=True,
)


def _slm(setting: Setting, case: str) -> Iterator[Row]:
    config = configured(setting, SLM, "default", "-", str(SLM_CAP_GB))
    if setting.on_gpu:
        limit_memory(SLM_CAP_GB)
    plan = plan_run(config)
    if case == "training":
        step = PlannedStep(setting, config, plan)
        allocated, reserved = step.peak()
        yield {"case": case, "batch": plan.batch_size, "peak_gb": allocated / 2**30, "reserved_gb": reserved / 2**30}
        return
    model = PlannedStep(setting, config, plan).model
    model = model.to(torch.float32 if setting.dry else torch.float16).eval()
    setting.release()
    length = config.data.seq_len
    prompt = list(range(1, length // 2))
    engine = Engine(model, None)

    def write() -> None:
        engine.generate([prompt], Sampling(temperature=0.0, max_new_tokens=length // 4))

    allocated, reserved = peak_of_call(setting, write)
    yield {"case": case, "batch": 1, "peak_gb": allocated / 2**30, "reserved_gb": reserved / 2**30}


SLM_PART = Part(
    "slm",
    f"{SLM} (T = 1024) under a cap of {SLM_CAP_GB} GiB: three training steps as planned, and generation in float16; a"
    " fresh process each",
    60,
    lambda setting: ["training", "inference"],
    _slm,
    [
        Bar(
            f"{SLM} training under {SLM_CAP_GB} GB: runs, peak",
            f"< {SLM_PEAK_GB:g} GiB",
            lambda value: value < SLM_PEAK_GB,
            lambda rows: pick(rows, "peak_gb", {"case": "training"}),
            unit=" GiB",
        ),
        Bar(
            f"{SLM} inference in float16: peak",
            f"< {SLM_INFERENCE_GB:g} GiB",
            lambda value: value < SLM_INFERENCE_GB,
            lambda rows: pick(rows, "peak_gb", {"case": "inference"}),
            unit=" GiB",
        ),
    ],
    fresh=True,
)

"""Every preset, at d12 where it takes sizes, planned for every card that a profile describes: the micro-batch, or what
is missing. And the advice that people with small cards follow today, as plans.

Nothing is measured and no card is needed: these are plans (docs/memory.md), with the profile's own global batch of 64
windows, bf16-mixed where the card has it, and the preset's optimizer. A cell is micro-batch x accumulation; "/n": one
layer in n is computed again.

python benchmarks/plan_presets.py [--only presets|advice]      prints the tables, writes results/plan_presets_*.md
"""

from __future__ import annotations

from harness.report import run, table

from hybridlm.cli.compose import compose_config
from hybridlm.config.groups import groups
from hybridlm.errors import UserError
from hybridlm.memory.plan import Plan, plan_run

CONTEXT = 1024
SIZE = "d12"  # of presets that take sizes; `hybridlm plan size=...` has the others
SKIPPED = {"auto", "cpu"}  # profiles that name no card
ADVICE = (  # card, what is said to train on it: sizes, micro-batches, contexts
    ("rtx4060", 8, ("d12", "d16"), (2,), (512, 1024)),
    ("rtx3060", 12, ("d16",), (4, 8), (1024,)),
    ("rtx3060", 12, ("d20",), (2, 4), (1024,)),
    ("rtx4080", 16, ("d20",), (8,), (2048,)),
    ("rtx4090", 24, ("d26",), (16,), (2048,)),
)
ADVISED = ("transformer", "hybrid_alternating")


def cell(plan: Plan) -> str:
    if not plan.fits:
        return f"needs {plan.reserved_bytes / 2**30:.1f} GiB"
    again = f" /{plan.checkpoint_blocks}" if plan.checkpoint_blocks else ""
    return f"{plan.batch_size} x {plan.accumulate}{again}"


def cards() -> list[str]:
    """Profiles, the smallest memory first."""
    names = [name for name in groups()["hardware"] if name not in SKIPPED]
    return sorted(names, key=lambda name: (compose_config([f"hardware={name}"]).hardware.memory_gb or 0.0, name))


def presets(_: int) -> list[str]:
    profiles, rows = cards(), []
    for preset in groups()["model"]:
        size = SIZE if SIZE in compose_config([f"model={preset}"]).model.sizes else "default"
        plans = []
        for name in profiles:
            try:
                plans.append(
                    plan_run(
                        compose_config(
                            [f"model={preset}", f"size={size}", f"data.seq_len={CONTEXT}", f"hardware={name}"]
                        )
                    )
                )
            except UserError as error:  # a preset whose precision the card has not
                plans.append(error.problems[0])
        cells = [plan if isinstance(plan, str) else cell(plan) for plan in plans]
        known = next(plan for plan in plans if isinstance(plan, Plan))
        rows.append([preset, size, f"{known.parameters / 1e6:.1f}M", *cells])
        print(" | ".join(rows[-1]), flush=True)
    head = ("preset", "size", "parameters", *profiles)
    return [f"Windows of {CONTEXT} tokens, global batch 64, plans without a measurement.", "", *table(head, rows)]


def advice(_: int) -> list[str]:
    rows = []
    for card, memory, sizes, batches, contexts in ADVICE:
        for model in ADVISED:
            for size in sizes:
                for batch in batches:
                    for context in contexts:
                        own = [f"model={model}", f"size={size}", f"hardware={card}", f"data.seq_len={context}"]
                        fixed = [f"data.batch_size={batch}", "data.global_batch=64"]
                        plain = plan_run(
                            compose_config([*own, *fixed, "trainer.checkpoint_blocks=0", "trainer.loss_rows=512"])
                        )
                        free = plan_run(compose_config([*own, *fixed]))
                        best = plan_run(compose_config([*own, "data.global_batch=64"]))
                        rows.append(
                            [
                                f"{memory} GB ({card})",
                                f"{model} {size}, {plain.parameters / 1e6:.0f}M",
                                f"{batch} x {context}",
                                "fits"
                                if plain.fits
                                else f"needs {plain.reserved_bytes / 2**30:.1f} of {_has(plain)} GiB",
                                cell(free),
                                cell(best),
                            ]
                        )
                        print(" | ".join(rows[-1]), flush=True)
    head = ("card", "model", "micro-batch", "as advised", "layers computed again where needed", "what the plan takes")
    key = "a x b: micro-batch x accumulation; /n: one layer in n is computed again in the backward."
    return [f"Plans without a measurement, Muon, bf16-mixed. {key}", "", *table(head, rows)]


def _has(plan: Plan) -> str:
    assert plan.limit_bytes is not None
    return f"{plan.limit_bytes / 2**30:.1f}"


if __name__ == "__main__":
    run("plan_presets", __doc__, {"presets": presets, "advice": advice}, rounds=1, least=1)

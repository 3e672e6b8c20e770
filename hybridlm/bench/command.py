"""`hybridlm bench`: measures models in turn, prints a table, and writes bench.json and bench.png."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.runs.run_folder import find_run

if TYPE_CHECKING:
    import torch

    from hybridlm.bench.measurement import Measurement
    from hybridlm.generate.engine import Engine

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")
_PIPED_WIDTH = 150  # columns of the table if there is no terminal


@dataclass(frozen=True)
class Benchmark:
    """What to measure. budget: the most seconds of a prompt and the tokens decoded after it."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    rounds: int
    budget: float
    dtype: str


def run_bench(
    run: str | None, configs: Mapping[str, RunConfig], asked: Benchmark, out: Path | None, *, ema: bool, as_json: bool
) -> None:
    """Measures a trained run, if one is given, and the models of ``configs`` by name. UserError: one of them is not
    available."""
    folder = None if run is None else find_run(run)[0]
    if asked.dtype not in DTYPES:
        raise UserError(f"--dtype {asked.dtype}: must be one of {', '.join(DTYPES)}")
    if ema and run is None:
        raise UserError("--ema: needs a trained run, as only that has a running average")
    out = out or (
        Path("outputs/bench") / time.strftime("%Y-%m-%d_%H-%M-%S") if folder is None else folder.path / "bench"
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be created ({error.strerror})") from None

    import torch
    from rich.console import Console

    from hybridlm.bench.models import trained, untrained
    from hybridlm.bench.report import plot, print_rows, rows
    from hybridlm.machine.device import inference_device

    device, dtype = inference_device(), getattr(torch, asked.dtype)
    models = {} if run is None else dict([trained(run, device, dtype, ema=ema)])
    models |= {name: untrained(config, device, dtype) for name, config in configs.items()}
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    machine = _machine(device)
    errors.print(
        f"{machine['device']}, torch {torch.__version__}, {asked.dtype}, {asked.rounds} rounds of {asked.new_tokens}"
        " tokens"
    )
    measured: list[Measurement] = []
    for some in _measured(models, asked):
        measured += some
        errors.print(f"measured  batch {some[0].batch}, context {some[0].context:,}")
    table = rows(measured)
    facts = {"format_version": FORMAT_VERSION, "machine": machine, "settings": asdict(asked), "points": table}
    text = json.dumps(facts, indent=1)
    if as_json:
        print(text)
    else:
        console = Console(highlight=False)
        print_rows(table, console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH))
    try:
        (out / "bench.json").write_text(text + "\n", encoding="utf-8")
        plot(table, f"{machine['device']}, {asked.dtype}", out / "bench.png")
    except OSError as error:  # the results are on the screen
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    errors.print(f"written to {out / 'bench.json'} and bench.png")


def _measured(models: Mapping[str, Engine], asked: Benchmark) -> Iterator[list[Measurement]]:
    """Batch by batch, the shortest context first: a model that was too slow at one is left out at longer ones."""
    from hybridlm.bench.measurement import measure, unmeasured

    for batch in asked.batches:
        slow: dict[str, int] = {}
        for context in sorted(asked.contexts):
            fast = {name: engine for name, engine in models.items() if name not in slow}
            found = measure(fast, batch, context, new_tokens=asked.new_tokens, rounds=asked.rounds, budget=asked.budget)
            for name, before in slow.items():
                one = unmeasured(name, models[name], batch, context)
                one.left_out = f"not tried: over the budget at {before:,} tokens"
                found.append(one)
            slow |= {one.name: context for one in found if one.left_out and one.name not in slow}
            yield sorted(found, key=lambda one: list(models).index(one.name))


def _machine(device: torch.device) -> dict[str, object]:
    import torch

    from hybridlm.machine.device import CUDA

    on_gpu = device.type == CUDA
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "peak_bytes_of": "allocated by torch on the device" if on_gpu else "resident, of the whole process",
    }

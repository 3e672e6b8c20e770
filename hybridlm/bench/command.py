"""What `hybridlm bench` does."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.runs.run_folder import find_run

if TYPE_CHECKING:
    import torch

    from hybridlm.bench.contenders import Contender
    from hybridlm.bench.turns import Point

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")
_PIPED_WIDTH = 150  # columns of the table where there is no terminal


@dataclass(frozen=True)
class Benchmark:
    """What is measured. budget: seconds that a prompt and the tokens behind it may take."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    rounds: int
    budget: float
    dtype: str


def run_bench(
    run: str | None, configs: Mapping[str, RunConfig], asked: Benchmark, out: Path | None, *, ema: bool, as_json: bool
) -> None:
    """Measures a trained run, if one is named, and the models of ``configs`` by name. ConfigError: one of them cannot
    be had."""
    folder = None if run is None else find_run(run)[0]
    if asked.dtype not in DTYPES:
        raise UserError(f"--dtype {asked.dtype}: legal are {', '.join(DTYPES)}")
    if ema and run is None:
        raise UserError("--ema: the running average of a trained run; name one")
    out = out or (
        Path("outputs/bench") / time.strftime("%Y-%m-%d_%H-%M-%S") if folder is None else folder.path / "bench"
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror})") from None

    import torch
    from rich.console import Console

    from hybridlm.bench.report import plot, print_rows, rows
    from hybridlm.machine.device import inference_device

    device = inference_device()
    contenders = _contenders(run, configs, device, getattr(torch, asked.dtype), ema=ema)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    machine = _machine(device)
    errors.print(
        f"{machine['device']}, torch {torch.__version__}, {asked.dtype}, {asked.rounds} rounds of {asked.new_tokens}"
        " tokens"
    )
    points: list[Point] = []
    for found in _points(contenders, asked):
        points += found
        errors.print(f"measured  batch {found[0].batch}, context {found[0].context:,}")
    table = rows(points)
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
    except OSError as error:  # nothing that was measured is lost: it is on the screen
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    errors.print(f"written to {out / 'bench.json'} and bench.png")


def _contenders(
    run: str | None, configs: Mapping[str, RunConfig], device: torch.device, dtype: torch.dtype, *, ema: bool
) -> list[Contender]:
    from hybridlm.bench.contenders import trained, untrained

    found = [] if run is None else [trained(run, device, dtype, ema=ema)]
    return found + [untrained(name, config, device, dtype) for name, config in configs.items()]


def _points(contenders: Sequence[Contender], asked: Benchmark) -> Iterator[list[Point]]:
    """Batch by batch, the shortest context first: a model for which one took too long is left out at longer ones."""
    from hybridlm.bench.turns import measure, point_of

    for batch in asked.batches:
        slow: dict[str, int] = {}
        for context in sorted(asked.contexts):
            racing = [contender for contender in contenders if contender.name not in slow]
            measured = {
                point.name: point
                for point in measure(
                    racing, batch, context, new_tokens=asked.new_tokens, rounds=asked.rounds, budget=asked.budget
                )
            }
            found = []
            for contender in contenders:
                point = measured.get(contender.name) or point_of(contender, batch, context)
                if contender.name in slow:
                    point.left_out = f"not tried: over the budget at {slow[contender.name]:,} tokens"
                elif point.left_out:
                    slow[contender.name] = context
                found.append(point)
            yield found


def _machine(device: torch.device) -> dict[str, object]:
    import torch

    from hybridlm.machine.device import CUDA

    on_gpu = device.type == CUDA
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    memory = "allocated by torch on the device" if on_gpu else "resident, of the whole process"
    return {
        "device": name,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "peak_bytes_of": memory,
    }

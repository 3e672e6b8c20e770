"""`hybridlm bench`: measures models in turn, prints a table, and writes bench.json."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.runs.run_folder import find_run

FORMAT_VERSION = 1
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
    beside = Path("outputs") if run is None else find_run(run)[0].path
    if ema and run is None:
        raise UserError("--ema: needs a trained run, as only that has a running average")
    out = out or beside / "bench" / (time.strftime("%Y-%m-%d_%H-%M-%S") if run is None else "")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be created ({error.strerror})") from None

    import torch
    from rich.console import Console

    from hybridlm.bench.measurement import measured, trained, untrained
    from hybridlm.bench.report import print_rows, rows
    from hybridlm.machine.device import CUDA, inference_device

    device, dtype = inference_device(), getattr(torch, asked.dtype)
    models = {} if run is None else dict([trained(run, device, dtype, ema=ema)])
    models |= {name: untrained(config, device, dtype) for name, config in configs.items()}
    name = f"CPU, {torch.get_num_threads()} threads" if device.type != CUDA else torch.cuda.get_device_name(device)
    machine = {"device": name, "processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    settings = f"{asked.dtype}, {asked.rounds} rounds of {asked.new_tokens} tokens"
    errors.print(f"{name}, torch {torch.__version__}, {settings}")
    found = []
    for some in measured(models, asked):
        found += some
        errors.print(f"measured  batch {some[0].batch}, context {some[0].context:,}")
    table = rows(found)
    facts = {"format_version": FORMAT_VERSION, "machine": machine, "settings": asdict(asked), "points": table}
    text = json.dumps(facts, indent=1)
    if as_json:
        print(text)
    else:
        console = Console(highlight=False)
        print_rows(table, console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH))
    try:
        (out / "bench.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:  # the results are on the screen
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    errors.print(f"written to {out / 'bench.json'}")

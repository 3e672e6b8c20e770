"""Run folders as training leaves them, made of invented figures."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import load_config, to_yaml


@cache
def base() -> str:
    """The configuration that all runs start from, as JSON."""
    return json.dumps(compose_config(["size=tiny", "trainer.max_steps=40"]).model_dump())


def config_text(pattern: str, seed: int, settings: dict | None = None) -> str:
    tree = json.loads(base())
    tree["seed"], tree["model"]["pattern"] = seed, pattern
    for key, value in (settings or {}).items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[last] = value
    return to_yaml(load_config(tree))


def summary(bpb: float, **others) -> dict:
    facts = {
        "val/loss": bpb * 1.5,
        "val/bpb": bpb,
        "gzip_bpb": 2.1,
        "xz_bpb": 1.8,
        "val_bytes": 290_000,
        "parameters": 200_000,
    }
    facts |= {
        "train_flops_per_token": 1.2e6,
        "tokens": 20_480,
        "tokens_per_s": 10_000.0,
        "memory_gb": 0.5,
        "seconds": 36.0,
    }
    return facts | {"device": "CPU, 1 threads", "devices": 1, "torch": "2.13.0"} | others


def rows(bpb: float, seed: int, steps: int = 40) -> list[dict]:
    noise = random.Random(seed)
    found = []
    for step in range(8, steps + 1, 8):
        row = {
            "step": step,
            "train/loss": 3.0,
            "train/bpb": bpb + 3 / step,
            "perf/step_s": 0.1,
            "perf/data_s": 0.01,
            "perf/val_s": 0.5,
        }
        found.append(row | {"val/bpb": bpb + 2 / step + noise.gauss(0, 0.01), "data/tokens": step * 512})
    return found


def make_run(
    folder: Path,
    *,
    pattern: str = "TM",
    seed: int = 0,
    bpb: float | None = 2.0,
    facts: dict | None = None,
    settings: dict | None = None,
    overrides: list[str] | None = None,
) -> Path:
    """bpb None: the run has no summary. facts: of summary.json, over the usual ones."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(pattern, seed, settings))
    given = overrides if overrides is not None else [f'++model.pattern="{pattern}"', f"++seed={seed}"]
    (folder / ".hydra/overrides.yaml").write_text(json.dumps(given))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(bpb or 2.0, seed)))
    if bpb is not None:
        (folder / "summary.json").write_text(json.dumps(summary(bpb, **(facts or {}))))
    (folder / "samples.txt").write_text("def f(x):\n    return x < 1 and '</pre>'\n")
    (folder / "layers.txt").write_text("layer  mixer\n    0  attention\n")
    return folder


def make_job(folder: Path, number: int, status: str, **facts) -> Path:
    """The record that the runner of a sweep keeps."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "number": number,
        "name": folder.name,
        "overrides": [],
        "point": {},
        "seed": 0,
        "status": status,
        "exit_code": 0,
    }
    record |= {"error": None, "started": None, "ended": None, "seconds": 36.0, "attempts": 1}
    (folder / "job.json").write_text(json.dumps(record | facts))
    return folder


def rewrite(folder, change):
    """change: of a row of the metrics, and its place."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row, i)) + "\n" for i, row in enumerate(rows)))


def without(*keys, but=()):
    return lambda row, i: {key: value for key, value in row.items() if key not in keys or i in but}

"""Muon or AdamW? The default job with each, over equal steps and over equal time on this machine.

python experiments/optimizers/run.py            # writes results.md and results.json beside this file
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RATES = (3e-3, 1e-2)  # of AdamW: the default of conf/optim/adamw.yaml, and three times that


def train(name: str, steps: int, seed: int, work: Path, *settings: str) -> dict[str, object]:
    """One run of the default job; its figures."""
    folder = work / f"{len(list(work.iterdir()))}"  # a comma of the name would mean a list to Hydra
    line = [
        sys.executable,
        str(ROOT / "train.py"),
        f"trainer.max_steps={steps}",
        f"seed={seed}",
        f"hydra.run.dir={folder}",
    ]
    line += ["trainer.val_every=null", "callbacks=none", "trainer.headless=true", "hardware=cpu", *settings]
    began = time.perf_counter()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "name": name,
        "steps": steps,
        "seed": seed,
        "bpb": summary["val/bpb"],
        "tokens_per_s": summary["tokens_per_s"],
        "seconds": seconds,
    }


def compare(steps: int, seed: int, work: Path) -> list[dict[str, object]]:
    """Muon and AdamW over ``steps``, and the better AdamW over as much training time as Muon had."""
    muon = train("muon", steps, seed, work, "optim=muon")
    adamws = [train(f"adamw, lr {rate:g}", steps, seed, work, "optim=adamw", f"optim.lr={rate}") for rate in RATES]
    best = min(range(len(RATES)), key=lambda number: adamws[number]["bpb"])
    longer = round(steps * adamws[best]["tokens_per_s"] / muon["tokens_per_s"])
    results = [muon, *adamws]
    if longer > steps:
        rate = RATES[best]
        results.append(train(f"adamw, lr {rate:g}, equal time", longer, seed, work, "optim=adamw", f"optim.lr={rate}"))
    return results


def report(results: list[dict], command: str) -> str:
    lines = [
        f"`{command}`, {os.cpu_count()} cores",
        "",
        "| optimizer | seed | steps | bits per byte | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        cells = (
            result["name"],
            result["seed"],
            result["steps"],
            f"{result['bpb']:.4f}",
            f"{result['tokens_per_s']:,.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps, those of the default job")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            results += compare(arguments.steps, seed, Path(folder))
            print(report(results, ""), flush=True)
    text = report(results, " ".join(["python experiments/optimizers/run.py", *sys.argv[1:]]))
    (FOLDER / "results.md").write_text(text, encoding="utf-8")
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

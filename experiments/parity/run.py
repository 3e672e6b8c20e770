"""Can the state of a Mamba count modulo two? Trains Mamba-3 and Mamba-2 of one size on parity and writes what came out.

python experiments/parity/run.py            # both models, three seeds each; results.md and accuracy.png beside this file
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybridlm.config.mixers import Mamba2Config, Mamba3Config
from hybridlm.config.model import ModelConfig
from hybridlm.config.synthetic import SyntheticConfig, words
from hybridlm.data.synthetic.examples import Examples, Split
from hybridlm.model.build import fresh_model
from hybridlm.model.lm import HybridLM

FOLDER = Path(__file__).parent
SHORTEST, LONGEST, TESTED = 40, 160, 256  # bits: the curriculum's first and last length, and the length of the test
LOOK_EVERY = 25  # steps between looks at how much is right
D_STATE, HEAD_DIM = 64, 32
DT_RANGE = (0.1, 1.0)  # initial step sizes: a turn by pi takes a step of one, which the usual 0.001 to 0.1 would have to grow to first
MODELS = {
    "mamba3": ModelConfig(
        d_model=64,
        pattern="M3:none*2",
        mamba3=Mamba3Config(d_state=D_STATE, head_dim=HEAD_DIM, rope_fraction=1.0, a_activation="softplus", dt_range=DT_RANGE, chunk=32),
    ),
    "mamba2": ModelConfig(
        d_model=64, pattern="M2:none*2", mamba2=Mamba2Config(d_state=D_STATE, head_dim=HEAD_DIM, dt_range=DT_RANGE, chunk=32)
    ),
}


class Result(NamedTuple):
    """One trained model: curve holds (step, length, loss, accuracy of the batch); accuracy (256,) of the test by position."""

    model: str
    seed: int
    parameters: int
    steps: int
    seconds: float
    curve: list[tuple[int, int, float, float]]
    accuracy: list[float]

    @property
    def beyond(self) -> float:
        """Share of right answers at positions 161 to 256, which no training text reached."""
        return sum(self.accuracy[LONGEST:]) / (TESTED - LONGEST)


def train(name: str, seed: int, steps: int, batch: int, lr: float) -> Result:
    """One model from scratch: AdamW with a linear warm-up and decay. The texts are 40 bits long and become 20 bits longer, up to 160,
    whenever the model answers 99% of a batch right."""
    began = time.perf_counter()
    model = fresh_model(MODELS[name], len(words(SyntheticConfig(task="parity"))), seed=seed, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    curve, length = [], SHORTEST
    for step in range(steps):
        ids, targets = texts(seed, "train", length, first=step * batch, count=batch)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
        loss = model(ids, targets=targets).loss_sum / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOOK_EVERY == 0:
            right = float(accuracy(model, seed, length, first=step * batch, count=batch).mean())
            curve.append((step + 1, length, float(loss.detach()), right))
            print(f"{name} seed {seed}  step {step + 1:5d}  {length:3d} bits  loss {loss:.4f}  right {right:.4f}", flush=True)
            if right >= 0.99:
                length = min(length + 20, LONGEST)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tested = accuracy(model, seed, TESTED, first=0, count=512).tolist()
    return Result(name, seed, parameters, steps, time.perf_counter() - began, curve, tested)


def texts(seed: int, split: Split, length: int, *, first: int, count: int) -> tuple[Tensor, Tensor]:
    """ids and answers (count, length) of the texts from number ``first`` on; none is in both splits."""
    made = Examples(SyntheticConfig(task="parity", seed=seed), split, length).make(np.arange(first, first + count))
    return torch.from_numpy(made[0]), torch.from_numpy(made[1])


@torch.inference_mode()
def accuracy(model: HybridLM, seed: int, length: int, *, first: int, count: int) -> Tensor:
    """(length,) share of right answers at each position, over texts that training did not see."""
    ids, targets = texts(seed, "val", length, first=first, count=count)
    return (model(ids).logits.argmax(-1) == targets).double().mean(0)


def report(results: list[Result], command: str) -> str:
    """The results as Markdown: a table of all runs and what the question's answer is."""
    lines = [
        f"`{command}`",
        "",
        "| model | seed | parameters | steps | seconds | right at 1-160 | right at 161-256 |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        trained = sum(result.accuracy[:LONGEST]) / LONGEST
        lines.append(
            f"| {result.model} | {result.seed} | {result.parameters:,} | {result.steps} | {result.seconds:.0f} "
            f"| {trained:.2%} | {result.beyond:.2%} |"
        )
    best = {name: max(result.beyond for result in results if result.model == name) for name in {result.model: 0 for result in results}}
    lines += ["", "Best seed at positions 161 to 256: " + ", ".join(f"{name} {share:.2%}" for name, share in best.items()) + "."]
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: Path) -> None:
    """Accuracy by position of every run, and the length up to which training went."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    colours = dict(zip(MODELS, ("tab:blue", "tab:orange"), strict=True))
    for result in results:
        label = result.model if result.seed == 0 else None
        axes.plot(range(1, TESTED + 1), result.accuracy, color=colours[result.model], alpha=0.7, linewidth=1, label=label)
    axes.axvline(LONGEST, color="grey", linestyle="--", linewidth=1)
    axes.annotate("longest text of training", (LONGEST - 3, 0.375), ha="right", color="grey")
    axes.set(
        xlabel="position (bits)", ylabel="share of right answers", ylim=(0.35, 1.03), xlim=(1, TESTED), title="Parity, three seeds each"
    )
    axes.legend(loc="center", bbox_to_anchor=(0.4, 0.65))
    figure.savefig(path, dpi=150)


def _one_thread() -> None:
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of a run")
    parser.add_argument("--batch", type=int, default=32, help="texts per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results.md, curves.json and accuracy.png")
    arguments = parser.parse_args()
    jobs = [(name, seed, arguments.steps, arguments.batch, arguments.lr) for seed in range(arguments.seeds) for name in arguments.models]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        results = list(pool.map(train, *zip(*jobs, strict=True)))
    results.sort(key=lambda result: (arguments.models.index(result.model), result.seed))
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = report(results, " ".join(["python experiments/parity/run.py", *sys.argv[1:]]))
    (arguments.out / "results.md").write_text(text, encoding="utf-8")
    (arguments.out / "curves.json").write_text(json.dumps([result._asdict() for result in results]) + "\n", encoding="utf-8")
    plot(results, arguments.out / "accuracy.png")
    print("\n" + text)


if __name__ == "__main__":
    main()

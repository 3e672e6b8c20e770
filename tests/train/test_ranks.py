"""The same steps on one process with accumulation and on two: what is learned does not hang on how a global batch is
cut.

Through the command line, so that Hydra's relaunch of the second process is part of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridlm.runs.checkpoint import read_checkpoint
from hybridlm.runs.run_folder import RunFolder

TRAIN = Path(__file__).parents[2] / "train.py"
SPECIALS = "data.tokenizer.special_tokens=['<|system|>','<|user|>','<|assistant|>','<|end|>']"
# eps is large because AdamW's first step is the gradient's sign: where a gradient is all rounding, its sign is a
# coin's.
COMMON = ["optim=adamw", "optim.eps=1e-3", "trainer.max_steps=20", "trainer.log_every=1", "trainer.val_every=10"]
# Without the balance loss, which is a statistic of each micro-batch.
MOE = ["model.pattern=T:moe M:moe", "model.moe.n_experts=4", "model.moe.d_expert=24", "model.moe.bias_update_rate=0.02"]
MOE += ["model.moe.router=sigmoid", "model.moe.balance_loss_weight=0", "model.moe.z_loss_weight=0.01"]
CASES = {
    "moe_with_bias_update": MOE,
    "conversations": [
        "data.path=CORPUS/chats.jsonl",
        "data.format=chat",
        "data.packing=true",
        SPECIALS,
        "data.seq_len=96",
    ],
    "packed_documents": ["data.path=CORPUS/lines.jsonl", "data.packing=true", "data.seq_len=700"],
}


def train(tiny: list[str], folder: Path, environment: dict[str, str], *settings: str) -> RunFolder:
    line = [sys.executable, str(TRAIN), *tiny, *COMMON, *settings, f"hydra.run.dir={folder}"]
    done = subprocess.run(line, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return RunFolder(folder)


def losses(run: RunFolder) -> list[float]:
    rows = [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]
    return [row[name] for row in rows for name in ("train/loss", "val/loss") if name in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision", "tolerance"),
    [("ddp", "32-true", 1e-5), ("fsdp2", "32-true", 1e-5), ("ddp", "64-true", 1e-9)],
    ids=["ddp", "fsdp2", "ddp64"],
)
@pytest.mark.parametrize("case", CASES)
def test_four_micro_batches_on_one_process_are_two_on_two(
    tiny, corpus, tmp_path, environment, case, strategy, precision, tolerance
):
    settings = [f"trainer.precision={precision}", *(setting.replace("CORPUS", str(corpus)) for setting in CASES[case])]
    one = train(tiny, tmp_path / "one", environment, *settings, "trainer.accumulate=4")
    two = train(
        tiny,
        tmp_path / "two",
        environment,
        *settings,
        "trainer.accumulate=2",
        "trainer.devices=2",
        f"trainer.strategy={strategy}",
    )
    assert len(losses(one)) == 22
    assert losses(two) == pytest.approx(losses(one), rel=tolerance)
    theirs = read_checkpoint(one.step_checkpoint(20))["state_dict"]
    for name, tensor in read_checkpoint(two.step_checkpoint(20))["state_dict"].items():
        torch.testing.assert_close(tensor, theirs[name], rtol=10 * tolerance, atol=tolerance)

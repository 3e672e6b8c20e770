"""What our model computes, for an exported one to be compared with, and the comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import RunFailed
from hybridlm.interop import verify
from hybridlm.model.lm import HybridLM

TOLERANCE = 1e-5  # largest difference over the largest logit, in fp32
_ULPS = 4  # or so many times what rounding alone changes, where that is more
_LENGTH, _PROMPT, _NEW = 48, 12, 24
_TEXTS = ("Hello, world!", "def f(x):\n    return x + 1\n", "naïve ☃ 你好 12345", "  two  spaces\n\n")
_SECONDS = 1800


@dataclass(frozen=True)
class Agreement:
    """Largest differences over the largest logit: of one forward, and of greedy decoding with a cache. greedy: how many
    of its tokens were the same, and of how many."""

    logits: float
    decode: float
    greedy: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"logits differ by {self.logits:.1e} of the largest, in cached decoding by {self.decode:.1e};"
            f" {self.greedy[0]} of {self.greedy[1]} greedy tokens are the same"
        )


@torch.inference_mode()
def write_reference(
    path: Path, model: HybridLM, tokenizer: Tokenizer, layer_ends: Sequence[int] = (), *, new: int = _NEW
) -> None:
    """What ``verify`` compares, of a model in fp32. new: tokens that are decoded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (2, _LENGTH), generator=generator)
    residuals: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, given, output: residuals.append(output[0])) for block in model.blocks
    ]
    logits = _logits(model, ids)
    for handle in handles:
        handle.remove()
    rounding = verify.difference(logits, _perturbed(model, ids))
    prompt = ids[:, :_PROMPT]
    cache = model.new_cache(len(prompt), _PROMPT + new)
    step, greedy, steps = model(prompt, cache, keep="last").logits, [], []
    for _ in range(new):
        steps.append(step[:, -1])
        greedy.append(step[:, -1].argmax(-1))
        step = model(greedy[-1].unsqueeze(1), cache, keep="last").logits
    tensors = {
        "ids": ids,
        "logits": logits,
        "residuals": torch.stack(residuals),
        "prompt": prompt,
        "greedy": torch.stack(greedy, 1),
        "greedy_logits": torch.stack(steps, 1),
    }
    texts = {"texts": _TEXTS, "text_ids": [tokenizer.encode(text) for text in _TEXTS]}
    facts = {"layer_ends": list(layer_ends), "rounding": rounding} | texts
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"facts": json.dumps(facts)})


def _logits(model: HybridLM, ids: Tensor) -> Tensor:
    logits: Tensor | None = model(ids).logits
    assert logits is not None
    return logits


def _perturbed(model: HybridLM, ids: Tensor) -> Tensor:
    """The logits where the embedding and the stream after each block are off by a unit in the last place, at random:
    about as much as two correct programs differ."""
    generator = torch.Generator().manual_seed(1)

    def off(x: Tensor) -> Tensor:
        signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
        return x * (1 + signs * torch.finfo(x.dtype).eps)

    handles = [model.embedding.register_forward_hook(lambda module, given, x: off(x))]
    handles += [block.register_forward_hook(lambda module, given, y: (off(y[0]), y[1])) for block in model.blocks]
    logits = _logits(model, ids)
    for handle in handles:
        handle.remove()
    return logits


def check(folder: Path, reference: Path, name: str) -> Agreement:
    """Loads ``folder`` in a process of its own and compares. RunFailed: it does not load, or computes something else;
    the message names the first layer that differs."""
    command = [sys.executable, "-P", str(Path(verify.__file__)), str(folder), str(reference)]
    # Nothing is fetched, and of code in the folder no copy stays behind.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(reference.parent / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RunFailed(f"{name}: the exported folder does not load: {reason}")
    return judged(json.loads(done.stdout.strip().splitlines()[-1]), name)


def judged(report: Mapping[str, Any], name: str) -> Agreement:
    """What ``verify.compare`` found. RunFailed: the two models differ, as in ``check``."""
    bound = min(10 * TOLERANCE, max(TOLERANCE, _ULPS * report["rounding"]))
    if not report["logits"] <= bound:
        wrong = [i for i, value in enumerate(report["layers"]) if not value <= bound]
        where = f"from layer {wrong[0]} on" if wrong else "after the last layer"
        raise RunFailed(
            f"{name}: the exported model computes something else {where}: logits differ by {report['logits']:.1e}"
        )
    if not report["decode"] <= 10 * bound:
        same = report["greedy"][0]
        raise RunFailed(f"{name}: decoding with a cache differs by {report['decode']:.1e} at token {same}")
    if not all(report["texts"]):
        text = _TEXTS[report["texts"].index(False)]
        raise RunFailed(f"{name}: the exported tokenizer gives other tokens for {text!r}")
    return Agreement(report["logits"], report["decode"], tuple(report["greedy"]))

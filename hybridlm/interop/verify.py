"""Loads an exported folder through transformers and compares it with what our model computes.

Run as a script in a process of its own: it needs torch, transformers and safetensors, and nothing of hybridlm, as the
people who get the folder have it. Prints one JSON object.

python verify.py FOLDER REFERENCE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def compare(folder: str, reference: str) -> dict[str, Any]:
    """What ``reference.judged`` reads: the largest differences, by layer too, and what is equal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with safe_open(reference, framework="pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        facts = json.loads(file.metadata()["facts"])
    remote = Path(folder, "modeling_hybridlm.py").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote)
    model.eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped form rounds more
    residuals = _watch(model, facts["layer_ends"])
    with torch.no_grad():
        logits = model(expected["ids"], use_cache=False).logits
    report: dict[str, Any] = {
        "layers": [difference(ours, theirs) for ours, theirs in zip(expected["residuals"], residuals, strict=True)],
        "logits": difference(expected["logits"], logits),
        "rounding": facts["rounding"],
    }
    report |= _generated(model, expected)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in facts["texts"]]
    report["texts"] = [mine == theirs for mine, theirs in zip(facts["text_ids"], ids, strict=True)]
    return report


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((ours - theirs).abs().max() / ours.abs().max())


def _watch(model: Any, ends: list[int]) -> list[Tensor]:
    """The residual streams after these layers, in the next forward."""
    stem = getattr(model, "model", None) or model.backbone
    layers = stem.layers if hasattr(stem, "layers") else stem.blocks
    found: list[Tensor] = []

    def keep(module: object, given: object, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    for end in ends:
        layers[end].register_forward_hook(keep)
    return found


def _generated(model: Any, expected: dict[str, Tensor]) -> dict[str, Any]:
    """Greedy decoding with a cache, as a user runs it."""
    model.generation_config.eos_token_id = None
    prompt, wanted = expected["prompt"], expected["greedy"]
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=wanted.shape[1],
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    ids = output.sequences[:, prompt.shape[1] :]
    logits = torch.stack(output.logits, 1)
    same = int((ids == wanted).long().cumprod(1).sum(1).min())  # tokens that all rows agree on
    steps = min(same + 1, logits.shape[1])
    return {
        "decode": difference(expected["greedy_logits"][:, :steps], logits[:, :steps].float()),
        "greedy": [same, wanted.shape[1]],
    }


if __name__ == "__main__":
    print(json.dumps(compare(*sys.argv[1:])))

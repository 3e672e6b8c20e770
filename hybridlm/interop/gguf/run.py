"""Loads a GGUF file in llama.cpp and compares it with what our model computes.

Run as a script in a process of its own: it needs llama-cpp-python and safetensors, and nothing of hybridlm. llama.cpp
ends the whole process where a file is not what it expects. Prints one JSON object.

python run.py FILE.gguf REFERENCE
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from safetensors import safe_open

_F32 = 0  # ggml's number of the type


def main(path: str, reference: str) -> None:
    import llama_cpp

    with safe_open(reference, framework="np") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        facts = json.loads(file.metadata()["facts"])
    llama = llama_cpp.Llama(
        path,
        n_ctx=expected["prompt"].shape[1] + expected["greedy"].shape[1] + expected["ids"].shape[1],
        logits_all=True,
        flash_attn=False,
        type_k=_F32,
        type_v=_F32,
        n_gpu_layers=0,
        verbose=False,
    )
    logits = np.stack([scores(llama, ids) for ids in expected["ids"]])
    report: dict[str, Any] = {"logits": difference(expected["logits"], logits)} | _generated(llama, expected)
    ids = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in facts["texts"]]
    report["texts"] = [mine == theirs for mine, theirs in zip(facts["text_ids"], ids, strict=True)]
    print(json.dumps(report))


def scores(llama: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of every position of a new sequence (T, V)."""
    llama.reset()
    llama.eval(ids.tolist())
    return np.array(llama.scores[: len(ids)])


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest number."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def _generated(llama: Any, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """Greedy decoding, token by token."""
    wanted, same, worst = expected["greedy"], [], 0.0
    for row, prompt in enumerate(expected["prompt"]):
        step, agreed = scores(llama, prompt)[-1], 0
        for place, token in enumerate(wanted[row].tolist()):
            worst = max(worst, difference(expected["greedy_logits"][row, place], step))
            if int(step.argmax()) != token:
                break
            agreed += 1
            llama.eval([token])
            step = np.array(llama.scores[llama.n_tokens - 1])
        same.append(agreed)
    return {"decode": worst, "greedy": [min(same), wanted.shape[1]]}


if __name__ == "__main__":
    main(*sys.argv[1:])

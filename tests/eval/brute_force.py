"""Scores and greedy text token by token, each from a forward of its own, and the model that they are computed with."""

from __future__ import annotations

import torch

from hybridlm.cli.compose import compose_config
from hybridlm.data.tokenizer import train_bpe
from hybridlm.model.build import fresh_model

TEXT = ["def f0(x):\n    return x * 3 + 1\n", "import os  # of the system\n", "class Number:\n    value = 12\n"] * 20


def bpe_tokenizer():
    """With merges, so that the border between context and continuation may fall inside a token."""
    return train_bpe(TEXT, 300)


def model_of(tiny, tokenizer, dtype=torch.float64):
    config = compose_config(
        [*tiny, "model.pattern=MTM3L:moe", "model.mamba3.d_state=8", "model.mamba3.head_dim=16", *MLA]
    )
    return fresh_model(config.model, tokenizer.vocab_size, seed=3, device="cpu").to(dtype).eval()


MLA = [
    "model.mla.n_heads=2",
    "model.mla.kv_lora_rank=8",
    "model.mla.qk_nope_head_dim=8",
    "model.mla.qk_rope_head_dim=8",
]
MLA += ["model.mla.v_head_dim=8", "model.moe.n_experts=4", "model.moe.d_expert=16"]


@torch.inference_mode()
def brute(model, context, continuation, max_length=64):
    """(log-likelihood, greedy) token by token, each from a forward of its own over at most ``max_length`` tokens before
    it.

    The window is that of the whole request, as in the harness: its last max_length inputs.
    """
    ids = (context + continuation)[-(max_length + 1) :]
    total, greedy = 0.0, True
    for place in range(len(ids) - len(continuation), len(ids)):
        logits = model(torch.tensor([ids[:place]]), keep="last").logits[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[place]])
        greedy = greedy and int(logits.argmax()) == ids[place]
    return total, greedy


def pair_ids(tokenizer, context, continuation):
    """As the harness documents it: blanks at the end of the context belong to the continuation, and the whole is cut
    behind the context."""
    kept = context.rstrip()
    whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(kept)
    return [tokenizer.eos_id, *alone], whole[len(alone) :]


def greedy_text(model, tokenizer, prompt, until, most):
    ids, new = list(prompt), []
    with torch.inference_mode():
        while len(new) < most:
            token = int(model(torch.tensor([ids]), keep="last").logits[0, -1].argmax())
            if token == tokenizer.eos_id:
                break
            new.append(token)
            ids.append(token)
    text = tokenizer.decode(new)
    for stop in until:
        text = text.split(stop)[0]
    return text

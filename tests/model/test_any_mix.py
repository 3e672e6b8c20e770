"""Any mixer with any FFN, in any order: learns, decodes what it computes, and counts what it has."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from recurrences import relative_error
from small_models import VOCAB, make_ids, recurrence_logits, small_config, small_model

from hybridlm.model.count import flops_per_token, parameters, state_bytes

MIXERS, FFNS = ("T", "W", "M1", "M2", "M3", "X", "L"), ("none", "mlp", "moe")
LAYERS = [f"{mixer}:{ffn}" for mixer, ffn in product(MIXERS, FFNS)]
SHUFFLED = [" ".join(random.Random(seed).sample(LAYERS, 5)) for seed in range(6)]
every_pattern = pytest.mark.parametrize("pattern", [*LAYERS, *SHUFFLED])


def test_the_shuffled_patterns_hold_every_layer():
    """Otherwise a pair of neighbours that does not work together could stay unseen."""
    assert {layer.split(":")[0] for pattern in SHUFFLED for layer in pattern.split()} == set(MIXERS)


@every_pattern
def test_it_learns_a_text_by_heart(pattern):
    model, ids = small_model(small_config(pattern), torch.float32), make_ids(2, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(12):
        output = model(ids[:, :-1], targets=ids[:, 1:])
        losses.append(float(output.loss_sum.detach()))
        (output.loss_sum / output.n_tokens + (0.0 if output.aux is None else output.aux)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@every_pattern
def test_it_decodes_what_it_computes(pattern):
    model, ids = small_model(small_config(pattern)), make_ids(2, 12)
    whole = model(ids).logits
    assert relative_error(whole, recurrence_logits(model, ids)[..., :VOCAB]) < 1e-10
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        pieces = [model(piece, cache=cache).logits for piece in ids.split((5, 4, 1, 1, 1), 1)]
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-10


@every_pattern
def test_it_counts_what_it_has(pattern):
    model = small_model(small_config(pattern))
    assert parameters(model) == sum(
        tensor.numel() for name, tensor in model.state_dict().items() if "correction_bias" not in name
    )
    for context in (1, 7, 40):
        assert state_bytes(model, context, 3, torch.float64) == model.new_cache(3, context).bytes
    assert flops_per_token(model, 16, "train") == 3 * flops_per_token(model, 16, "prefill")

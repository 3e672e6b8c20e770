"""The whole model: logits and loss against the token-by-token model, and one function however the text is cut."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from recurrences import assert_near, relative_error
from small_models import VOCAB, make_ids, recurrence_logits, small_config, small_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridlm.config.ffns.mlp import MLPConfig
from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.layers.sequence import SequenceInfo
from hybridlm.model.lm import HybridLM

PATTERNS = ["T", "T:none", "M", "M:mlp", "TM", "MTM", "M:mlp T:none M:none"]
MULTIPLIERS = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "embedding_scale": {"embedding_scale": 3.0},
    "residual_scale": {"residual_scale": 0.4},
    "logit_scale": {"logit_scale": 0.2},
    "logit_softcap": {"logit_softcap": 1.5},
    "attention_scale": {"attention": AttentionConfig(n_heads=2, scale=1.7)},
    "relu2": {"mlp": MLPConfig(d_ff=12, activation="relu2")},
    "norm_eps": {"norm_eps": 0.3},
    "all": {
        "tie_embeddings": False,
        "embedding_scale": 3.0,
        "residual_scale": 0.4,
        "logit_scale": 0.5,
        "logit_softcap": 1.5,
        "attention": AttentionConfig(n_heads=2, scale=1.7, qk_norm=True, rope=True, window=4),
    },
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_multiplier = pytest.mark.parametrize("changes", MULTIPLIERS.values(), ids=MULTIPLIERS)


def in_pieces(model: HybridLM, ids: Tensor, cuts: list[int], max_len: int):
    """All logits and the cache, the text cut in front of the tokens ``cuts``."""
    cache = model.new_cache(ids.shape[0], max_len)
    with torch.no_grad():
        parts = [model(ids[:, start:end], cache=cache).logits for start, end in pairwise([0, *cuts, ids.shape[1]])]
    return torch.cat(parts, 1), cache


@every_multiplier
def test_logits_are_the_recurrences(changes):
    model, ids = small_model(small_config("MTM", **changes)), make_ids(2, 11)
    logits = model(ids).logits
    assert logits.dtype == torch.float64
    assert relative_error(logits, recurrence_logits(model, ids)[..., :VOCAB]) < 1e-10


@every_pattern
def test_logits_of_every_pattern(pattern):
    model, ids = small_model(small_config(pattern)), make_ids(2, 11)
    assert relative_error(model(ids).logits, recurrence_logits(model, ids)[..., :VOCAB]) < 1e-10


@pytest.mark.parametrize("name", [name for name in MULTIPLIERS if name != "plain"])
def test_every_multiplier_does_something(name):
    """Otherwise the comparison with the recurrence could pass with both sides ignoring it."""
    config = small_config("MTM", **MULTIPLIERS[name])
    if name == "untied":
        assert small_model(config).head_weight is not small_model(config).embedding.weight
    else:
        ids = make_ids(1, 5)
        assert relative_error(small_model(config)(ids).logits, small_model(small_config("MTM"))(ids).logits) > 1e-3


@every_multiplier
def test_the_loss_is_that_of_the_logits(changes):
    """Value and every gradient, with targets that do not count; the fused head against log_softmax."""
    model, ids = small_model(small_config("MTM", **changes)), make_ids(2, 11)
    targets = make_ids(2, 11, seed=3)
    targets[0, :4] = -100
    targets[1, 10] = -100
    fused = model(ids, targets=targets)
    assert fused.logits is None
    assert int(fused.n_tokens) == 17
    counted = targets != -100
    log_p = model(ids).logits.log_softmax(-1)[counted]
    plain = -log_p.gather(-1, targets[counted][:, None]).sum()
    slow = -recurrence_logits(model, ids).log_softmax(-1)[counted].gather(-1, targets[counted][:, None]).sum()
    names = list(dict(model.named_parameters()))
    results = []
    for loss in (fused.loss_sum, plain, slow):
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append({"loss": loss} | dict(zip(names, grads, strict=True)))
    assert_near(results[0], results[1], 1e-10)
    assert_near(results[0], results[2], 1e-10)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_ids_are_never_predicted(tied):
    """Whatever their weights are: no logits, no share of the loss, and no gradient but what the embedding looked up."""
    model, ids = small_model(small_config("TM", tie_embeddings=tied)), make_ids(2, 6)
    before, loss_before = model(ids).logits, model(ids, targets=ids).loss_sum
    assert model.head_weight.shape[0] == 16
    with torch.no_grad():
        model.head_weight[VOCAB:] = 1e3
    output = model(ids, targets=ids)
    assert model(ids).logits.shape == (2, 6, VOCAB)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(output.loss_sum, loss_before)
    output.loss_sum.backward()
    assert bool((model.head_weight.grad[VOCAB:] == 0).all())


def test_keep_names_the_last_tokens():
    model, ids = small_model(small_config()), make_ids(2, 9)
    logits = model(ids, keep="all").logits
    for keep, last in (("last", 1), (1, 1), (4, 4), (9, 9)):
        kept = model(ids, keep=keep).logits
        assert kept.shape == (2, last, VOCAB)
        assert relative_error(kept, logits[:, -last:]) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_pattern
def test_any_cut_of_the_text_gives_the_same(pattern, dtype):
    model, ids = small_model(small_config(pattern), dtype), make_ids(3, 14)
    whole = model(ids).logits
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for seed in range(4):
        cuts = sorted(random.Random(seed).sample(range(1, 14), [0, 3, 7, 13][seed]))
        pieces, cache = in_pieces(model, ids, cuts, 14 + seed)
        assert relative_error(pieces, whole) < tolerance, cuts
        assert cache.past == 14
        assert cache.lengths.tolist() == [14] * 3


def test_the_loss_also_continues_a_cache():
    """Evaluation of a long text in pieces: the sums add up to the loss of the whole."""
    model, ids, targets = small_model(small_config()), make_ids(2, 12), make_ids(2, 12, seed=5)
    whole = model(ids, targets=targets).loss_sum
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        parts = [model(ids[:, a:b], cache=cache, targets=targets[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert relative_error(sum(part.loss_sum for part in parts), whole) < 1e-12
    assert [int(part.n_tokens) for part in parts] == [10, 2, 12]


def test_only_the_model_advances_the_position():
    model, ids = small_model(small_config("TM")), make_ids(2, 5)
    cache = model.new_cache(2, 20)
    assert (cache.past, cache.lengths.tolist()) == (0, [0, 0])
    seq = SequenceInfo.contiguous(2, 5, 0, torch.device("cpu"))
    with torch.no_grad():
        x = model.embedding(ids)
        for block, layer in zip(model.blocks, cache.layers, strict=True):
            x, _ = block(x, seq, layer)
    assert (cache.past, cache.lengths.tolist()) == (0, [0, 0])
    model(ids)
    model(ids, targets=ids)
    assert cache.past == 0
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        for width, past in ((5, 5), (1, 6), (3, 9)):
            model(ids[:, :width], cache=cache, keep="last")
            assert (cache.past, cache.lengths.tolist()) == (past, [past, past])


def test_no_token_sees_the_future():
    model, ids = small_model(small_config("MTM")), make_ids(2, 11)
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB
    logits, other = model(ids).logits, model(changed).logits
    assert float((logits - other)[:, :6].detach().abs().max()) <= 1e-12
    assert float((logits - other)[:, 6:].detach().abs().amin((0, 2)).min()) > 0


def test_bfloat16_autocast_gives_float32_logits_and_loss():
    model, ids = small_model(small_config("MTM"), torch.float32), make_ids(2, 11)
    exact = model(ids, targets=ids).loss_sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(ids).logits, model(ids, targets=ids).loss_sum
    assert logits.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["float64", "autocast"])
def test_activation_checkpointing_changes_nothing(precision):
    """Saved tensors are read once and the recomputation is the same computation."""
    model, ids = (
        small_model(small_config("MT"), torch.float64 if precision == "float64" else torch.float32),
        make_ids(2, 9),
    )
    seq = SequenceInfo.contiguous(2, 9, 0, torch.device("cpu"))
    results = []
    for recompute in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            x = model.embedding(ids)
            for block in model.blocks:
                x = (checkpoint(block, x, seq, None, use_reentrant=False) if recompute else block(x, seq, None))[0]
        x.float().square().sum().backward()
        results.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert len(results[0]) == len(list(model.parameters())) - 1  # the final norm stands behind the blocks
    assert_near(results[1], results[0], 1e-12)


def test_a_random_model_starts_at_the_entropy_of_a_guess():
    """Freshly drawn, tied and small, the loss per token is close to log V and not to the logarithm of the padded
    size."""
    torch.manual_seed(0)
    model = small_model(small_config("MTM"), torch.float32)
    model.reset_parameters()
    ids, targets = make_ids(4, 50), make_ids(4, 50, seed=9)
    loss = model(ids, targets=targets).loss_sum.item() / 200
    assert loss == pytest.approx(math.log(VOCAB), abs=0.05)
    assert abs(loss - math.log(16)) > 0.15


def test_the_loss_of_each_target_adds_up():
    """Beside the logits; a target that does not count is zero."""
    model, ids, targets = small_model(small_config("MT")), make_ids(3, 9), make_ids(3, 9, seed=5)
    targets[1, 4:] = -100
    whole, each = model(ids, targets=targets), model(ids, targets=targets, each=True)
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(each.losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(each.loss_sum, whole.loss_sum, rtol=1e-12, atol=1e-12)
    assert torch.equal(each.likeliest, logits.argmax(-1) == targets)
    assert each.n_tokens == whole.n_tokens == 22
    assert whole.losses is None

"""What every mixer computes, for every option of each kind: its recurrence, one function however the text is cut,
causal, rows apart."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_specs import (
    ATTENTION,
    GQA,
    MLA,
    SPECS,
    assert_same,
    every_mixer,
    forward,
    forward_in_pieces,
    make_input,
    make_mixer,
    recurrence,
    states_agree,
)
from recurrences import relative_error

from hybridlm.layers.sequence import SequenceInfo

TIME = 17


@every_mixer
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (2, 1), (1, 2), (2, TIME)])
def test_output_and_every_gradient_is_the_recurrences(spec, batch, time):
    mixer, x = make_mixer(spec), make_input(batch, time).requires_grad_()
    weights = make_input(batch, time, seed=5)
    leaves = {"x": x, **dict(mixer.named_parameters())}
    results = []
    for y in (forward(mixer, x), recurrence(spec, dict(mixer.named_parameters()), x)):
        grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
        results.append({"y": y} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    assert_same(*results, 1e-10)


@every_mixer
def test_any_cut_of_the_text_gives_the_same(spec):
    """Prefill, chunked prefill, decode and any mixture are one function; so is what they leave in the cache."""
    mixer, x = make_mixer(spec), make_input(2, TIME)
    whole, cache = forward_in_pieces(mixer, x, [], TIME)
    assert relative_error(whole, forward(mixer, x)) < 1e-12

    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(cuts=st.sets(st.integers(1, TIME - 1)))
    def gives_the_same(cuts):
        pieces, cut_cache = forward_in_pieces(mixer, x, sorted(cuts), TIME)
        assert relative_error(pieces, whole) < 1e-10
        states_agree(cut_cache.tensors(), cache.tensors(), 1e-10)

    gives_the_same()


@every_mixer
@pytest.mark.parametrize("seed", range(3))
def test_any_cut_in_float32(spec, seed):
    mixer, x = make_mixer(spec, torch.float32), make_input(2, TIME, torch.float32)
    cuts = sorted(random.Random(seed).sample(range(1, TIME), [3, 8, TIME - 1][seed]))
    pieces, _ = forward_in_pieces(mixer, x, cuts, TIME + 5)
    assert pieces.dtype == torch.float32
    assert relative_error(pieces, forward(mixer, x)) < 1e-4
    assert relative_error(pieces, forward(make_mixer(spec), x.double())) < 1e-4


@every_mixer
def test_no_token_sees_the_future(spec):
    mixer, x = make_mixer(spec), make_input(2, TIME)
    y = forward(mixer, x).detach()
    for t in (1, 7, 8, TIME - 1):
        changed = x.clone()
        changed[:, t] += 1.0
        y_changed = forward(mixer, changed).detach()
        assert float((y_changed[:, :t] - y[:, :t]).abs().max()) <= 1e-12, t
        assert float((y_changed[:, t] - y[:, t]).abs().max()) > 1e-3, t


@pytest.mark.parametrize("window", [1, 3, TIME])
@pytest.mark.parametrize("cuts", [[], list(range(5, TIME))], ids=["whole", "decoded"])
def test_a_window_ends_where_it_says(window, cuts):
    """With window w, token t is the last thing that token t + w - 1 sees, and nothing to token t + w."""
    mixer, x, t = make_mixer(replace(GQA, window=window)), make_input(1, TIME), 0 if window == TIME else 6
    changed = x.clone()
    changed[:, t] += 1.0
    difference = (
        (forward_in_pieces(mixer, changed, cuts, TIME)[0] - forward_in_pieces(mixer, x, cuts, TIME)[0])
        .abs()
        .amax((0, 2))
    )
    assert bool((difference[t : t + window] > 1e-6).all())
    assert bool((difference[t + window :] == 0).all())


@every_mixer
@pytest.mark.parametrize("cuts", [[], [4, 5, 6]], ids=["whole", "pieces"])
def test_rows_of_a_batch_do_not_meet(spec, cuts):
    mixer, x = make_mixer(spec), make_input(3, TIME)
    together, _ = forward_in_pieces(mixer, x, cuts, TIME)
    for row in range(3):
        alone, _ = forward_in_pieces(mixer, x[row : row + 1], cuts, TIME)
        assert relative_error(together[row : row + 1], alone) < 1e-12


@pytest.mark.parametrize("spec", [ATTENTION, MLA], ids=["attention", "mla"])
def test_a_full_cache_refuses_politely(spec):
    mixer, x = make_mixer(spec), make_input(1, 5)
    with pytest.raises(ValueError, match=r"4 tokens, 5 are needed"):
        forward_in_pieces(mixer, x, [3], 4)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("attention", "k"),
        ("attention_window", "k"),
        ("mla", "c_kv"),
        *((kind, "conv") for kind in ("mamba1", "mamba2", "gdn", "kda")),
    ],
)
def test_a_narrow_cache_only_rounds(name, kept):
    """A bfloat16 cache under a float32 layer: the same text up to rounding, in float32."""
    mixer, x = make_mixer(SPECS[name], torch.float32), make_input(2, TIME, torch.float32)
    pieces, cache = forward_in_pieces(mixer, x, list(range(4, TIME)), TIME, cache_dtype=torch.bfloat16)
    assert cache.tensors()[kept].dtype == torch.bfloat16
    assert pieces.dtype == torch.float32
    assert 0 < relative_error(pieces, forward(mixer, x)) < 2e-2


@pytest.mark.parametrize("name", ["attention_rope", "mla", "mla_half_split"])
def test_rotation_follows_the_positions_it_is_given(name):
    """Positions come from the model, row by row, not from the place in the tensor."""
    mixer, x = make_mixer(SPECS[name]), make_input(2, 5)
    shifted = mixer(x, SequenceInfo(torch.arange(5).expand(2, 5) + 30))
    assert relative_error(shifted, forward(mixer, x)) < 1e-10, "only distances count"
    stretched = mixer(x, SequenceInfo(torch.tensor([[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]])))
    assert relative_error(stretched[0], forward(mixer, x)[0]) < 1e-12
    assert relative_error(stretched[1], forward(mixer, x)[1]) > 1e-3


@pytest.mark.parametrize("name", ["mamba3", "mamba3_mimo"])
def test_angles_are_kept_within_a_turn_and_do_not_drift(name):
    """After 4,000 tokens in float32, decoded or at once, the angle is that of float64."""
    spec = replace(SPECS[name], n_heads=1, chunk=64)
    x = make_input(1, 4000)
    with torch.no_grad():
        _, wide = forward_in_pieces(make_mixer(spec), x, [], 4000)
        _, narrow = forward_in_pieces(make_mixer(spec, torch.float32), x.float(), [1000, 1001], 4000)
    want, got = wide.tensors()["angle"], narrow.tensors()["angle"].double()
    assert float(got.abs().max()) <= 2 * math.pi + 1e-5
    assert float((torch.remainder(got - want + math.pi, 2 * math.pi) - math.pi).abs().max()) < 2e-3

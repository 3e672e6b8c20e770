"""What only gated DeltaNet and Kimi Delta Attention have: costs by hand, their weights, and what each option is for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mixer_specs import CPU, GDN, KDA, forward, forward_in_pieces, make_input, make_mixer
from recurrences import relative_error
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from hybridlm.config.mixers.gdn import GDNConfig
from hybridlm.config.mixers.kda import KDAConfig
from hybridlm.config.model import ModelConfig
from hybridlm.errors import ConfigError
from hybridlm.layers.init import Init
from hybridlm.layers.sequence import SequenceInfo

TIME = 17
INIT = Init(std=None, residual="depth", n_layers=3)
both = pytest.mark.parametrize("spec", [GDN, KDA], ids=["gdn", "kda"])


@both
def test_state_bytes_by_hand(spec):
    """The state stays float32; the convolution's K - 1 columns of [q, k, v] have the activations' dtype."""
    grouped = replace(spec, n_v_heads=4)
    conv, state = 3 * (8 + 8 + 24), 4 * 4 * 6
    assert make_mixer(grouped).state_bytes(1000, 5, torch.bfloat16) == 5 * (2 * conv + 4 * state)
    assert make_mixer(replace(grouped, use_conv=False)).state_bytes(1, 5, torch.bfloat16) == 5 * 4 * state


def test_flops_by_hand():
    """D 8, two heads of 4 x 6, K 4, chunks of 8."""
    conv, state = 2 * 4 * (8 + 8 + 12), 2 * 3 * 2 * 4 * 6  # predicted, written, read
    tile = 2 * (2 * 2 * 8 * 4 + 2 * 2 * 8 * 6 + 8 * 8)  # keys with keys and queries, twice values, the inverse
    of_both = 2 * 8 * (8 + 8 + 12 + 2) + 2 * 12 * 8
    gdn = of_both + 2 * 8 * (2 + 12)  # decay, gate
    kda = of_both + 2 * (8 * 6 + 6 * 8) + 2 * (8 * 6 + 6 * 12)  # the same, each through the rank of a head's values
    for spec, projections in ((GDN, gdn), (KDA, kda)):
        mixer = make_mixer(spec)
        assert mixer.flops(1000, "decode") == projections + conv + state
        assert mixer.flops(1000, "prefill") == projections + conv + state + tile
        assert make_mixer(replace(spec, use_conv=False)).flops(9, "decode") == projections + state
    assert make_mixer(GDN).flops(1000, "prefill") - make_mixer(replace(GDN, use_gate=False)).flops(1000, "prefill") == (
        2 * 8 * 12
    )


@both
def test_decays_are_drawn_as_published(spec):
    """dt log-uniform in dt_range with a floor of 1e-4, one for each head or channel; -A uniform in a_range."""
    many = replace(spec, d_model=2, n_k_heads=500, n_v_heads=500, a_range=(1.0, 16.0), dt_range=(2e-3, 0.2))
    mixer = make_mixer(many, torch.float32)
    torch.manual_seed(0)
    mixer.reset_parameters(INIT)
    dt, rate = softplus(mixer.dt_bias.detach().double()), mixer.A_log.detach().double().exp()
    assert len(dt) == 500 * (4 if spec is KDA else 1)
    assert 2e-3 * (1 - 1e-4) <= float(dt.min()) < 2.5e-3
    assert 0.17 < float(dt.max()) <= 0.2 * (1 + 1e-4)
    assert float(dt.log().mean()) == pytest.approx(math.log(0.02), abs=0.2)
    assert 1 - 1e-5 <= float(rate.min()) < 1.2
    assert 15.7 < float(rate.max()) <= 16 + 1e-4
    assert float(rate.mean()) == pytest.approx(8.5, abs=0.6)
    floored = make_mixer(replace(many, dt_range=(1e-7, 1e-6)), torch.float32)
    floored.reset_parameters(INIT)
    assert torch.allclose(softplus(floored.dt_bias), torch.tensor(1e-4), rtol=1e-3)
    assert bool((mixer.o_norm.weight == 1).all())


@both
def test_a_group_of_value_heads_shares_its_key_head(spec):
    """Value head h reads key head h // (n_v_heads / n_k_heads): the second key head reaches the last two only."""
    mixer, x = make_mixer(replace(spec, n_v_heads=4, use_conv=False)), make_input(1, TIME)
    outputs = []
    mixer.gated = lambda o, x: outputs.append(o.detach()) or o
    forward(mixer, x)
    with torch.no_grad():
        mixer.k_proj.weight[4:] *= -2
        mixer.k_proj.weight[4] += 1
    forward(mixer, x)
    difference = (outputs[0] - outputs[1]).abs().amax((0, 1, 3))
    assert float(difference[:2].max()) == 0
    assert float(difference[2:].min()) > 1e-3


@both
def test_the_same_token_twice(spec):
    """At full strength the second write changes nothing, or, with eigenvalues down to -1, undoes the first."""
    kept = {}
    for allow in (False, True):
        mixer = make_mixer(replace(spec, allow_neg_eigval=allow, use_conv=False))
        with torch.no_grad():
            mixer.b_proj.weight.zero_()
            mixer.b_proj.weight += 20  # beta as large as it may be
            mixer.dt_bias.fill_(-30.0)  # no decay
        outputs = []
        mixer.gated = lambda o, x, outputs=outputs: outputs.append(o.detach()) or o
        forward(mixer, make_input(1, 1).abs().expand(1, 4, -1))
        o = outputs[0][0, :, 0]
        kept[allow] = float((o[1] * o[0]).sum()) / float((o[0] * o[0]).sum())
    assert kept[False] == pytest.approx(1, abs=1e-3)  # v is stored by the first write
    assert kept[True] == pytest.approx(0, abs=1e-3)  # 2 v, then 2 v + 2 (v - 2 v) = 0


def test_the_lower_bound_holds():
    mixer, x = make_mixer(replace(KDA, lower_bound=-0.5)), 100 * make_input(2, TIME)
    log_decay = mixer.log_decay(x)
    assert log_decay.shape == (2, TIME, 2, 4)
    assert float(log_decay.min()) >= -0.5
    assert float(log_decay.max()) <= 0
    assert float(make_mixer(KDA).log_decay(x).min()) < -0.5
    assert "ssm/dt_mean" in make_mixer(KDA).metrics()
    assert mixer.metrics() == {}, "its steps are not softplus"


@both
def test_activation_checkpointing_changes_no_gradient(spec):
    mixer, x = make_mixer(spec), make_input(2, TIME).requires_grad_()
    leaves = [x, *mixer.parameters()]
    want = torch.autograd.grad(forward(mixer, x).square().sum(), leaves)
    got = torch.autograd.grad(checkpoint(lambda x: forward(mixer, x), x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@both
def test_gradcheck(spec):
    mixer = make_mixer(replace(spec, chunk=4, n_v_heads=4, allow_neg_eigval=True))
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        seq = SequenceInfo.contiguous(1, 6, 0, CPU)
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (x, seq))

    inputs = [make_input(1, 6).requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@both
def test_the_state_of_a_narrow_model_is_wide(spec):
    mixer, x = make_mixer(spec, torch.bfloat16), make_input(2, TIME, torch.bfloat16)
    pieces, cache = forward_in_pieces(mixer, x, [6, 7, 8], TIME)
    assert {name: tensor.dtype for name, tensor in cache.tensors().items()} == {
        "conv": torch.bfloat16,
        "recurrent": torch.float32,
    }
    assert relative_error(pieces, forward(mixer, x)) < 3e-2


@pytest.mark.parametrize("section", [GDNConfig, KDAConfig])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"head_k_dim": 48}, "head_k_dim"),
        ({"head_v_dim": 100}, "head_v_dim"),
        ({"n_v_heads": 4, "n_k_heads": 3}, "n_k_heads"),
        ({"chunk": 48}, "chunk"),
        ({"dt_range": [0.1, 0.01]}, "dt_range"),
        ({"a_range": [0.0, 1.0]}, "a_range"),
    ],
)
def test_a_wrong_section_names_its_field(section, changes, field):
    with pytest.raises(ConfigError) as caught:
        section(**changes).resolve(ModelConfig(d_model=256), "model.x")
    assert [line.split(" ")[0] for line in caught.value.problems] == [f"model.x.{field}"]


def test_heads_follow_from_the_width():
    spec = GDNConfig(head_v_dim=32).resolve(ModelConfig(d_model=256), "model.gdn")
    assert (spec.n_k_heads, spec.n_v_heads, spec.head_k_dim, spec.head_v_dim) == (8, 8, 64, 32)
    wide = GDNConfig(n_k_heads=2).widened(ModelConfig(d_model=256), 2, 8).resolve(ModelConfig(d_model=256), "")
    assert (wide.n_k_heads, wide.n_v_heads) == (4, 8)

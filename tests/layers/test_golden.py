"""Every layer against tensors from independent implementations (transformers, mamba_ssm), at each case's own tolerance.

The metric is max|a - b| / max|b| per tensor; angles are compared modulo a whole turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import (
    FOLDER,
    MIXERS,
    MOE,
    MOE_SOFTMAX,
    SCANS,
    circular,
    golden_states,
    load,
    mixer_spec,
    moe_spec,
    prefill_length,
)
from mixer_specs import CPU, forward, forward_in_pieces, layer_of
from recurrences import assert_near, below, relative_error
from torch import Tensor

from hybridlm.layers.mixer import Mixer
from hybridlm.layers.moe import MoE
from hybridlm.layers.sequence import SequenceInfo

every_mixer = pytest.mark.parametrize("case", MIXERS)


def build(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Mixer:
    """The layer with the case's parameters, by name and with none left over."""
    mixer = layer_of(mixer_spec(facts["config"]))
    mixer.load_state_dict(below(tensors, "param."), strict=True)
    return mixer


def build_moe(facts: dict[str, Any], tensors: dict[str, Tensor]) -> MoE:
    layer = MoE(moe_spec(facts["config"]))
    layer.load_state_dict(below(tensors, "param."), strict=True)
    return layer


def test_every_case_is_tested():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {*MIXERS, *MOE}
    assert len({*MIXERS, *MOE}) == 37


@every_mixer
def test_output_and_gradients(case):
    facts, tensors = load(case)
    mixer = build(facts, tensors)
    u = tensors["u"].requires_grad_()
    y = forward(mixer, u)
    assert relative_error(y, tensors["y"]) < facts["tolerance"]["y"]
    leaves = {"u": u, **dict(mixer.named_parameters())}
    grads = torch.autograd.grad((y * tensors["grad_out"]).sum(), list(leaves.values()))
    assert_near(dict(zip(leaves, grads, strict=True)), below(tensors, "grad."), facts["tolerance"]["grad"])


@every_mixer
@pytest.mark.parametrize("way", ["prefill", "decode"])
def test_decoding_gives_y(case, way):
    """One token at a time from ``prefill_len`` on, and from the very first on."""
    facts, tensors = load(case)
    start, total = prefill_length(facts) if way == "prefill" else 1, tensors["u"].shape[1]
    y, _ = forward_in_pieces(build(facts, tensors), tensors["u"], list(range(start, total)), total)
    assert relative_error(y, tensors["y"]) < facts["tolerance"]["y"]


@every_mixer
@pytest.mark.parametrize("way", ["prefill", "decode"])
def test_states(case, way):
    """After the prefill, and after the last token. Keys are cached after the rotation, the latent after its norm."""
    facts, tensors = load(case)
    spec, mixer = mixer_spec(facts["config"]), build(facts, tensors)
    start, total = prefill_length(facts), tensors["u"].shape[1]
    for length in (start, total):
        want = golden_states(spec, tensors, length)
        if not want:  # the attention cases hold the state at the end only
            assert (facts["config"]["mixer"], length) == ("attention", start)
            continue
        cuts = [] if way == "prefill" else list(range(min(start, length - 1), length))
        _, cache = forward_in_pieces(mixer, tensors["u"][:, :length], cuts, length)
        got = {name: circular(name, tensor, want[name]) for name, tensor in cache.tensors().items()}
        assert_near(got, want, facts["tolerance"]["state"])


@pytest.mark.parametrize("case", SCANS)
def test_decoding_from_the_golden_state(case):
    """The state of another implementation continues here: the layout is right, not only consistent with itself."""
    facts, tensors = load(case)
    start, total = prefill_length(facts), tensors["u"].shape[1]
    mixer, rows, line = build(facts, tensors), tensors["u"].shape[0], []
    cache = mixer.new_cache(rows, total, dtype=torch.float32, device=CPU)
    cache.replace(golden_states(mixer_spec(facts["config"]), tensors, start))
    with torch.no_grad():
        for t in range(start, total):
            line.append(mixer(tensors["u"][:, t : t + 1], SequenceInfo.contiguous(rows, 1, t, CPU), cache))
    assert relative_error(torch.cat(line, 1), tensors["y"][:, start:]) < facts["tolerance"]["y"]


@pytest.mark.parametrize("case", [case for case in MIXERS if case.startswith("mla")])
def test_decoding_latent_attention_from_the_golden_cache(case):
    facts, tensors = load(case)
    start, total = prefill_length(facts), tensors["u"].shape[1]
    mixer, rows, line = build(facts, tensors), tensors["u"].shape[0], []
    cache = mixer.new_cache(rows, total, dtype=torch.float32, device=CPU)
    for name, tensor in golden_states(mixer_spec(facts["config"]), tensors, start).items():
        cache.tensors()[name][:, :start] = tensor
    with torch.no_grad():
        for t in range(start, total):
            line.append(mixer(tensors["u"][:, t : t + 1], SequenceInfo.contiguous(rows, 1, t, CPU), cache))
    assert relative_error(torch.cat(line, 1), tensors["y"][:, start:]) < facts["tolerance"]["y"]


@pytest.mark.parametrize("case", MOE)
def test_experts_output_and_gradients(case):
    facts, tensors = load(case)
    layer, u = build_moe(facts, tensors), tensors["u"].requires_grad_()
    y, stats = layer(u)
    assert relative_error(y, tensors["y"]) < facts["tolerance"]["y"]
    counts = tensors["topk_indices"].flatten().bincount(minlength=facts["config"]["n_experts"])
    assert stats.counts.tolist() == counts.tolist()
    leaves = {"u": u, **dict(layer.named_parameters())}
    grads = torch.autograd.grad((y * tensors["grad_out"]).sum(), list(leaves.values()))
    assert_near(dict(zip(leaves, grads, strict=True)), below(tensors, "grad."), facts["tolerance"]["grad"])


@pytest.mark.parametrize("case", MOE)
def test_each_token_goes_where_it_should(case):
    """Run by itself, a token's counts are the experts it chose, and its z-loss is that of its logits."""
    facts, tensors = load(case)
    layer = build_moe(facts, tensors)
    tokens = tensors["u"].flatten(0, 1)
    for token, chosen, logits in zip(tokens, tensors["topk_indices"], tensors["router_logits"], strict=True):
        with torch.no_grad():
            stats = layer(token.view(1, 1, -1))[1]
        assert stats.counts.nonzero().flatten().tolist() == sorted(chosen.tolist())
        assert float(stats.z_loss) == pytest.approx(
            float(logits.double().logsumexp(0) ** 2), rel=facts["tolerance"]["y"]
        )


@pytest.mark.parametrize("case", MOE)
def test_the_weights_of_the_chosen_experts(case):
    """Told from the gradient of down_proj: an expert's output is that matrix times its hidden channels, times the
    token's weight."""
    facts, tensors = load(case)
    layer = build_moe(facts, tensors)
    gate_up, width = tensors["param.experts.gate_up_proj"].double(), facts["config"]["expert_intermediate"]
    rows = zip(tensors["u"].flatten(0, 1), tensors["topk_indices"], tensors["topk_weights"], strict=True)
    for token, chosen, weights in rows:
        y, _ = layer(token.view(1, 1, -1))
        (grad,) = torch.autograd.grad(y[0, 0, 0], [layer.get_parameter("experts.down_proj")])
        for index, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up = (gate_up[index] @ token.double()).split(width)
            hidden = torch.nn.functional.silu(gate) * up
            assert relative_error(grad[index, 0], weight * hidden) < facts["tolerance"]["grad"]
        assert float(grad[[e for e in range(len(grad)) if e not in chosen]].abs().max()) == 0


@pytest.mark.parametrize("case", MOE_SOFTMAX)
def test_balance_loss_is_the_published_one_divided_by_k(case):
    facts, tensors = load(case)
    layer, u = build_moe(facts, tensors), tensors["u"].requires_grad_()
    published = layer(u)[1].balance_loss * facts["config"]["top_k"]
    assert relative_error(published.reshape(1), tensors["aux_loss"]) < facts["tolerance"]["y"]
    grads = torch.autograd.grad(published, [u, layer.get_parameter("gate.weight")])
    assert_near(
        dict(zip(("u", "gate.weight"), grads, strict=True)), below(tensors, "aux_grad."), facts["tolerance"]["grad"]
    )

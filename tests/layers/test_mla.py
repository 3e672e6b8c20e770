"""Latent attention: two equal forms of it, what is cached, what it costs, and how its parts are declared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recurrences import assert_near, below, relative_error
from recurrences import mla as recurrence
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hybridlm.config.mixers.mla import MLASpec
from hybridlm.layers.init import Init
from hybridlm.layers.mla import LATENT_NORM_EPS, MLA
from hybridlm.layers.sequence import SequenceInfo

FOLDER = Path(__file__).parents[1] / "golden"
CASES = ["mla_no_qlora", "mla_qlora", "mla_qlora_no_interleave"]
CPU = torch.device("cpu")
TIME = 13
SMALL = MLASpec(
    d_model=8,
    n_heads=2,
    kv_lora_rank=5,
    q_lora_rank=3,
    qk_nope_head_dim=3,
    qk_rope_head_dim=4,
    v_head_dim=6,
    rope=True,
    rope_theta=100.0,
    rope_interleave=True,
    scale=0.6,
)
SPECS = {
    "q_lora": SMALL,
    "full_q": replace(SMALL, q_lora_rank=None),
    "half_split": replace(SMALL, rope_interleave=False),
    "unrotated": replace(SMALL, rope=False),
    "no_shared_key": replace(SMALL, rope=False, qk_rope_head_dim=0),
    "narrow_latent": replace(SMALL, kv_lora_rank=1, n_heads=3),
    "wide_latent": replace(SMALL, kv_lora_rank=40, q_lora_rank=None),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def make(spec: MLASpec, dtype: torch.dtype = torch.float64) -> MLA:
    mixer, g = MLA(spec), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            values = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * values if "norm" in name else values * parameter.shape[1] ** -0.5)
    return mixer.to(dtype)


def make_input(time: int = TIME, dtype: torch.dtype = torch.float64, batch: int = 2, width: int = 8) -> Tensor:
    return torch.randn(batch, time, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def plain(x: Tensor, past: int = 0) -> SequenceInfo:
    return SequenceInfo.contiguous(x.shape[0], x.shape[1], past, CPU)


def golden(case: str) -> tuple[dict, dict[str, Tensor], MLA]:
    facts, tensors = json.loads((FOLDER / f"{case}.json").read_text()), load_file(FOLDER / f"{case}.safetensors")
    config = facts["config"]
    sizes = ("d_model", "n_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    rope = {name: config[name] for name in ("rope_theta", "rope_interleave")}
    mixer = MLA(MLASpec(**{name: config[name] for name in sizes}, **rope, rope=True, scale=scale))
    mixer.load_state_dict(below(tensors, "param."), strict=True)
    return facts, tensors, mixer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["_expanded", "_absorbed"])
def test_both_forms_are_deepseeks(case, form, monkeypatch):
    """Output and every gradient."""
    facts, tensors, mixer = golden(case)
    monkeypatch.setattr(MLA, "_absorbing_pays", lambda *args: form == "_absorbed")
    u = tensors["u"].requires_grad_()
    y = mixer(u, plain(u))
    assert relative_error(y, tensors["y"]) < facts["tolerance"]["y"]
    leaves = {"u": u, **dict(mixer.named_parameters())}
    grads = torch.autograd.grad((y * tensors["grad_out"]).sum(), list(leaves.values()))
    assert_near(dict(zip(leaves, grads, strict=True)), below(tensors, "grad."), facts["tolerance"]["grad"])


@pytest.mark.parametrize("case", CASES)
def test_decoding_and_its_states_are_deepseeks(case):
    """The latent after its norm, and the shared key rotated, in the layout of its rotation."""
    facts, tensors, mixer = golden(case)
    u, start = tensors["u"], facts["config"]["prefill_len"]
    cache = mixer.new_cache(u.shape[0], u.shape[1], dtype=torch.float32, device=CPU)
    with torch.no_grad():
        y = [mixer(u[:, :start], plain(u[:, :start]), cache)]
        got = {name: tensor[:, :start] for name, tensor in cache.tensors().items()}
        assert_near(got, below(tensors, f"state@{start}."), facts["tolerance"]["state"])
        y += [mixer(u[:, t : t + 1], plain(u[:, :1], t), cache) for t in range(start, u.shape[1])]
    assert relative_error(torch.cat(y, 1), tensors["y"]) < facts["tolerance"]["y"]
    assert_near(cache.tensors(), below(tensors, f"state@{u.shape[1]}."), facts["tolerance"]["state"])


@every_spec
@pytest.mark.parametrize("absorbed", [False, True])
def test_both_forms_are_the_formula(spec, absorbed, monkeypatch):
    monkeypatch.setattr(MLA, "_absorbing_pays", lambda *args: absorbed)
    mixer, x = make(spec), make_input().requires_grad_()
    leaves = {"x": x, **dict(mixer.named_parameters())}
    results = []
    for y in (mixer(x, plain(x)), recurrence(dict(mixer.named_parameters()), x, spec)[0]):
        grads = torch.autograd.grad((y * make_input().flip(1)).sum(), list(leaves.values()))
        results.append({"y": y} | dict(zip(leaves, grads, strict=True)))
    assert_near(*results, 1e-11)


@every_spec
@pytest.mark.parametrize("cut", [1, 5, 11, 12])
def test_a_piece_after_a_past_in_either_form(spec, cut, monkeypatch):
    mixer, x = make(spec), make_input()
    whole = mixer(x, plain(x)).detach()
    for absorbed in (False, True):
        monkeypatch.setattr(MLA, "_absorbing_pays", lambda *args, absorbed=absorbed: absorbed)
        cache = mixer.new_cache(2, TIME, dtype=x.dtype, device=CPU)
        with torch.no_grad():
            pieces = [mixer(x[:, :cut], plain(x[:, :cut]), cache), mixer(x[:, cut:], plain(x[:, cut:], cut), cache)]
        assert relative_error(torch.cat(pieces, 1), whole) < 1e-11


def products(monkeypatch: pytest.MonkeyPatch, mixer: MLA, queries: int, keys: int, absorbed: bool) -> int:
    """Matrix-product FLOPs of one row between its latents and the heads' outputs: torch counts all but the fused
    attention, and that one is counted by the shapes that it is given."""
    spec, attended = mixer.spec, []

    def counted(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
        attended.append(2 * q.shape[1] * q.shape[2] * k.shape[1] * (k.shape[3] + v.shape[3]))
        return q.new_zeros(*q.shape[:3], v.shape[3])

    monkeypatch.setattr("hybridlm.layers.mla.attention", counted)
    q = [torch.zeros(1, queries, spec.n_heads, width) for width in (spec.qk_nope_head_dim, spec.qk_rope_head_dim)]
    k = [torch.zeros(1, keys, width) for width in (spec.kv_lora_rank, spec.qk_rope_head_dim)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (mixer._absorbed if absorbed else mixer._expanded)(*q, *k, None)
    return counter.get_total_flops() + sum(attended)


@every_spec
def test_the_cheaper_form_is_taken_after_a_past(spec, monkeypatch):
    """Where the two differ by more than the channels by which the absorbed form's values are wider than need be."""
    mixer = make(spec, torch.float32)
    for past in (0, 1, 2, 5, 30, 200):
        for queries in (1, 2, 3, 10, 40, 200):
            expanded, absorbed = (products(monkeypatch, mixer, queries, past + queries, form) for form in (False, True))
            slack = 2 * spec.n_heads * queries * (past + queries) * spec.qk_rope_head_dim
            takes_absorbed = mixer._absorbing_pays(queries, past + queries)
            if not past or expanded < absorbed - slack:
                assert not takes_absorbed, (past, queries)
            elif absorbed < expanded:
                assert takes_absorbed, (past, queries)


def test_decode_is_absorbed_and_training_expanded():
    """With the widths of conf/, and with DeepSeek's."""
    for spec in (replace(SMALL, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64), SMALL):
        mixer = make(spec, torch.float32)
        assert all(mixer._absorbing_pays(1, keys) for keys in (2, 3, 100, 10_000))
        assert not any(mixer._absorbing_pays(queries, queries) for queries in (1, 2, 100, 10_000))
    large = make(
        replace(SMALL, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128), torch.float32
    )
    assert large._absorbing_pays(64, 4096)
    assert not large._absorbing_pays(1024, 4096)


def test_flops_by_hand(monkeypatch):
    """D 8, two heads of 3 + 4 and 6, ranks 5 and 3. A multiply-add counts two."""
    mixer = make(SMALL)
    projections = 2 * (8 * 3 + 3 * 2 * (3 + 4) + 8 * (5 + 4) + 5 * 2 * (3 + 6) + 2 * 6 * 8)
    assert mixer.flops(1, "prefill") == projections + 2 * 2 * (3 + 4 + 6)
    assert mixer.flops(5, "prefill") == projections + 2 * 2 * (3 + 4 + 6) * (1 + 2 + 3 + 4 + 5) / 5
    assert mixer.flops(5, "train") == 3 * mixer.flops(5, "prefill")
    # Into and out of the latent costs what expanding the new token would; then keys of c + r channels and values of c.
    assert mixer.flops(10, "decode") == projections + 2 * 2 * (5 + 4 + 5) * 11
    expansion = products(monkeypatch, mixer.float(), 1, 1, True) - 2 * 2 * (5 + 4 + 5 + 4)
    assert expansion == 2 * 5 * 2 * (3 + 6)


@every_spec
def test_the_cache_holds_the_latent_and_the_shared_key_alone(spec):
    mixer = make(spec)
    cache = mixer.new_cache(3, 40, dtype=torch.bfloat16, device=CPU)
    shapes = {name: tuple(tensor.shape) for name, tensor in cache.tensors().items()}
    assert shapes == {"c_kv": (3, 40, spec.kv_lora_rank), "k_rope": (3, 40, spec.qk_rope_head_dim)}
    assert mixer.state_bytes(40, 3, torch.bfloat16) == sum(tensor.nbytes for tensor in cache.tensors().values())


def test_latent_norms_have_an_epsilon_of_their_own():
    """Seen where the latents are as small as its root: the output then depends on it."""
    assert LATENT_NORM_EPS == 1e-6
    mixer, x = make(SMALL), 1e-3 * make_input()
    want = recurrence(dict(mixer.named_parameters()), x, SMALL)[0]
    assert relative_error(mixer(x, plain(x)), want) < 1e-11


def test_without_rotation_the_shared_key_still_counts():
    """Its channels carry no position: shifting all positions, or shuffling the past, changes nothing."""
    mixer, x = make(SPECS["unrotated"]), make_input()
    y = mixer(x, plain(x))
    assert torch.equal(mixer(x, SequenceInfo(torch.arange(TIME).flip(0).expand(2, TIME))), y)
    order = torch.cat([torch.randperm(TIME - 1, generator=torch.Generator().manual_seed(0)), torch.tensor([TIME - 1])])
    assert relative_error(mixer(x[:, order], plain(x))[:, -1], y[:, -1]) < 1e-12
    with torch.no_grad():
        mixer.kv_a_proj_with_mqa.weight[SMALL.kv_lora_rank :] = 0
    assert relative_error(mixer(x, plain(x)), y) > 1e-2


def test_rotation_sees_distances_alone():
    mixer, x = make(SMALL), make_input()
    y = mixer(x, plain(x))
    assert relative_error(mixer(x, SequenceInfo(torch.arange(TIME).expand(2, TIME) + 70)), y) < 1e-11
    assert relative_error(mixer(x, SequenceInfo(2 * torch.arange(TIME).expand(2, TIME))), y) > 1e-3


@pytest.mark.parametrize("absorbed", [False, True])
def test_autocast_keeps_the_softmax_and_the_norms_wide(absorbed, monkeypatch):
    """Many tokens that all look alike: in bfloat16 their probabilities would not sum to one."""
    monkeypatch.setattr(MLA, "_absorbing_pays", lambda *args: absorbed)
    spec = replace(SMALL, scale=0.01)
    mixer, x = make(spec, torch.float32), make_input(700, torch.float32)
    x[..., 0] += 3.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x, plain(x))
    assert y.dtype == torch.bfloat16
    want = make(spec)(x.double(), plain(x))
    assert float((y - want).detach().norm() / want.detach().norm()) < 1e-2
    y.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in mixer.parameters())


def test_a_narrow_cache_only_rounds():
    mixer, x = make(SMALL, torch.float32), make_input(dtype=torch.float32)
    cache = mixer.new_cache(2, TIME, dtype=torch.bfloat16, device=CPU)
    with torch.no_grad():
        pieces = [
            mixer(x[:, :5], plain(x[:, :5]), cache),
            *(mixer(x[:, t : t + 1], plain(x[:, :1], t), cache) for t in range(5, TIME)),
        ]
    assert pieces[-1].dtype == torch.float32
    assert 0 < relative_error(torch.cat(pieces, 1), mixer(x, plain(x))) < 2e-2


def test_every_block_of_rows_is_declared():
    specs = make(SMALL).param_specs()
    assert specs["kv_a_proj_with_mqa.weight"].row_blocks == (5, 4)
    assert specs["kv_b_proj.weight"].row_blocks == (3, 6, 3, 6)
    assert {name for name, spec in specs.items() if spec.role == "vector"} == {
        "q_a_layernorm.weight",
        "kv_a_layernorm.weight",
    }
    assert not any(spec.row_blocks for name, spec in specs.items() if not name.startswith("kv_"))
    assert make(SPECS["no_shared_key"]).param_specs()["kv_a_proj_with_mqa.weight"].row_blocks == ()


def test_fresh_weights():
    spec = replace(SMALL, d_model=64, n_heads=8, kv_lora_rank=50, q_lora_rank=40, qk_nope_head_dim=16, v_head_dim=16)
    mixer = MLA(spec)
    mixer.reset_parameters(Init(std=None, residual="depth", n_layers=3))
    for name, parameter in mixer.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            want = parameter.shape[1] ** -0.5 / (math.sqrt(6) if name == "o_proj.weight" else 1)
            assert float(parameter.detach().std()) == pytest.approx(want, rel=0.1), name

"""Groups, clipping, refused steps, each algorithm against its definition or torch's own, and its state over a round
trip."""

import copy
import sys
import types

import pytest
import torch
from toy import SPECS, make, toy, train

from hybridlm.config.optim import LRScale, MuonConfig, OptimConfig
from hybridlm.errors import UserError
from hybridlm.layers.init import MATRIX, VECTOR, ParamSpec
from hybridlm.optim.eight_bit import refuse_missing_kernels
from hybridlm.optim.optimizer import HybridOptimizer, group_table, param_groups


def test_groups_carry_what_their_parameters_declare():
    config = OptimConfig(lr=0.1, weight_decay=0.3, lr_scale=LRScale(vector=0.5), name="muon", muon=MuonConfig(lr=0.7))
    groups = {group["name"]: group for group in param_groups(toy().named_parameters(), SPECS, config)}
    assert {
        name: (group["lr"], group["weight_decay"], group["algorithm"], len(group["params"]))
        for name, group in groups.items()
    } == {
        "matrix": (0.7, 0.3, "muon", 2),
        "vector, no decay": (0.05, 0.0, "adamw", 2),
    }


def test_a_parameter_without_a_spec_is_an_error():
    with pytest.raises(KeyError):
        param_groups(toy().named_parameters(), {"0.weight": MATRIX}, OptimConfig())


def test_clipping_bounds_the_global_norm_and_reports_the_norm_before():
    model = toy()
    optimizer = make(model, lr=0.01, clip=0.5)
    model(torch.randn(8, 6)).square().sum().backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    optimizer.step()
    assert norm > 0.5
    torch.testing.assert_close(optimizer.grad_norm, norm)
    clipped = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_state_survives_a_round_trip(name, dtype):
    whole = toy().to(dtype)
    straight = make(whole, name=name)
    train(whole, straight, 3)
    saved, weights = copy.deepcopy(straight.state_dict()), copy.deepcopy(whole.state_dict())
    want = train(whole, straight, 3)
    resumed = toy(seed=9).to(dtype)
    resumed.load_state_dict(weights)
    optimizer = make(resumed, name=name)
    optimizer.load_state_dict(saved)
    for a, b in zip(train(resumed, optimizer, 3), want, strict=True):
        assert torch.equal(a, b)
    for (mine, ours), (its, theirs) in zip(optimizer.state.items(), straight.state.items(), strict=True):
        assert mine.dtype == its.dtype == dtype
        assert all(value.dtype == torch.float32 and torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_bfloat16_weights_move_as_fp32_ones_and_are_rounded_once(name):
    narrow, wide = toy().bfloat16(), toy()
    wide.load_state_dict({key: value.float() for key, value in narrow.state_dict().items()})
    optimizers = [make(model, name=name, clip=0.5) for model in (narrow, wide)]
    torch.manual_seed(1)
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(a, b.bfloat16(), rtol=2**-7, atol=1e-5)  # clipping rounds the gradients of bfloat16


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
@pytest.mark.parametrize("veto", [False, True])
def test_a_refused_step_changes_nothing(name, veto):
    model = toy()
    optimizer = make(model, name=name)
    train(model, optimizer, 2)
    before = copy.deepcopy([optimizer.state_dict(), model.state_dict()])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if veto:
        optimizer.veto = lambda: True
    else:
        model[1].bias.grad[1] = float("inf")
    optimizer.step()
    assert (optimizer.refused, optimizer.skipped) == (True, 1)
    after = [optimizer.state_dict(), model.state_dict()]
    assert all(torch.equal(after[1][key], value) for key, value in before[1].items())
    for number, state in before[0]["state"].items():
        assert all(torch.equal(after[0]["state"][number][key], value) for key, value in state.items())


def test_rate_scale_multiplies_every_rate():
    scaled, lower = toy(), toy()
    optimizer = make(scaled, name="muon", lr=0.5)
    optimizer.rate_scale = 0.25
    reference = make(lower, name="muon", lr=0.125, muon=MuonConfig(lr=0.005))
    for a, b in zip(train(scaled, optimizer), train(lower, reference), strict=True):
        assert torch.equal(a, b)
    assert optimizer.used_lr == 0.125


def test_group_settings_come_from_this_run_not_from_the_checkpoint():
    before, after = toy(), toy()
    saved = make(before, weight_decay=0.5).state_dict()
    for group in saved["param_groups"]:
        del group["row_blocks"]  # as a checkpoint of shards does
    optimizer = make(after, weight_decay=0.25)
    optimizer.load_state_dict(saved)
    assert [(group["weight_decay"], group["row_blocks"]) for group in optimizer.param_groups] == [
        (0.25, [(), ()]),
        (0.0, [(), ()]),
    ]


def test_the_table_of_groups_names_what_each_gets():
    config = OptimConfig(name="muon", lr=0.003, weight_decay=0.1, muon=MuonConfig(lr=0.02))
    table = group_table(param_groups(toy().named_parameters(), SPECS, config)).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["matrix", "muon", "2", "36", "0.02", "0.1"],
        ["vector,", "no", "decay", "adamw", "2", "7", "0.003", "0"],
    ]


class Pretended8bit:
    """What ``HybridOptimizer`` needs of bitsandbytes' class: groups, ``state`` and ``step``; moments as bytes."""

    def __init__(self, params, lr, betas, eps):
        self.param_groups, self.state = [dict(group) for group in params], {}

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("state1", torch.zeros_like(parameter, dtype=torch.uint8)).add_(1)
                state["step"] = state.get("step", 0) + 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * state["state1"])


def test_eight_bit_moments_keep_their_dtype_over_a_round_trip(monkeypatch):
    """The package itself needs CUDA; here it is what ours hands to it and saves of it."""
    package = types.ModuleType("bitsandbytes")
    package.optim = types.SimpleNamespace(AdamW8bit=Pretended8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    model, again = toy(), toy(seed=9)
    optimizer, resumed = make(model, name="adamw8bit", lr=0.01), make(again, name="adamw8bit", lr=0.01)
    train(model, optimizer, 3)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(
        state["state1"].dtype == torch.uint8 and int(state["state1"].max()) == 3 for state in resumed.state.values()
    )
    for a, b in zip(train(model, optimizer, 3), train(again, resumed, 3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_eight_bit_moments_train_on_a_card_and_resume():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    models = [torch.nn.Linear(128, 128).cuda() for _ in range(2)]
    specs = {"weight": MATRIX, "bias": VECTOR}
    config = OptimConfig(name="adamw8bit", lr=0.01)
    optimizers = [HybridOptimizer(param_groups(model.named_parameters(), specs, config), config) for model in models]
    x = torch.randn(64, 128, device="cuda")

    def losses(model, optimizer):
        values = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    first = losses(models[0], optimizers[0])
    assert first[-1] < first[0]
    assert optimizers[0].state[models[0].weight]["state1"].dtype == torch.uint8
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert losses(models[0], optimizers[0]) == losses(models[1], optimizers[1])


def test_eight_bit_moments_are_refused_where_there_are_no_kernels(monkeypatch):
    refuse_missing_kernels(OptimConfig(), "cpu")
    with pytest.raises(UserError, match=r"optim\.name = 'adamw8bit'.*adamw, muon, lion or sgd"):
        refuse_missing_kernels(OptimConfig(name="adamw8bit"), "cpu")
    monkeypatch.setattr("hybridlm.optim.eight_bit.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        refuse_missing_kernels(OptimConfig(name="adamw8bit"), "cuda")


def test_muon_leaves_vectors_and_embeddings_to_adamw():
    specs = {**SPECS, "0.weight": ParamSpec(decay=False, role="embedding")}
    config = OptimConfig(name="muon")
    algorithms = {group["name"]: group["algorithm"] for group in param_groups(toy().named_parameters(), specs, config)}
    assert algorithms == {"embedding, no decay": "adamw", "vector, no decay": "adamw", "matrix": "muon"}

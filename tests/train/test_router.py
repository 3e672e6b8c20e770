"""Routers in training: the loss they add, the bias that evens out their experts, what is logged, several processes,
resume."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import run_ranks
from torch import Tensor

from hybridlm.cli.compose import compose_config
from hybridlm.config.ffns.moe import MoEConfig
from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.model import ModelConfig
from hybridlm.config.optim import OptimConfig
from hybridlm.layers.ffn import RouterStats
from hybridlm.layers.moe import move_bias
from hybridlm.model.build import fresh_model
from hybridlm.optim.optimizer import HybridOptimizer, model_groups
from hybridlm.runs.checkpoint import load_run, read_checkpoint
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.lightning_module import LitLM
from hybridlm.train.metrics import COLUMNS
from hybridlm.train.router import RouterCallback, routers_of
from hybridlm.train.run import run

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
VOCAB, E = 13, 4


def make_model(**changes):
    moe = MoEConfig(
        **({"n_experts": E, "top_k": 2, "d_expert": 6, "router": "sigmoid", "bias_update_rate": 0.1} | changes)
    )
    config = ModelConfig(
        d_model=8, pattern="T:moe T:mlp T:moe", vocab_multiple=8, attention=AttentionConfig(n_heads=2), moe=moe
    )
    return fresh_model(config, VOCAB, seed=0, device="cpu").double()


def make_ids(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, 6), generator=torch.Generator().manual_seed(seed))


# ---- the loss


def gradients(model, batches: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[dict]]:
    """What backward leaves behind after these micro-batches of one step, by LitLM's own training_step."""
    module = LitLM(model, OptimConfig(), SimpleNamespace(max_steps=1, accumulate=1), facts={}, sharded=False)
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=len(batches))
    model.zero_grad()
    counted = torch.tensor(sum(int((targets >= 0).sum()) for _, targets in batches))
    outputs = []
    for ids, targets in batches:
        outputs.append(module.training_step({"ids": ids, "targets": targets, "n_targets": counted}, 0))
        (outputs[-1]["loss"] / len(batches)).backward()  # as Lightning does
    return [parameter.grad.clone() for parameter in model.parameters()], outputs


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def expected(model, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Sum of all losses, each micro-batch's mean router loss times its counted targets, over the targets of the whole
    step."""
    total, counted = 0.0, 0
    for ids, targets in batches:
        output = model(ids, targets=targets)
        total, counted = (
            total + output.loss_sum + output.aux * (targets >= 0).sum(),
            counted + int((targets >= 0).sum()),
        )
    return list(torch.autograd.grad(total / counted, list(model.parameters())))


def halves(ids: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(ids.chunk(2), targets.chunk(2), strict=True))


def test_the_loss_is_cross_entropy_plus_the_routers_losses():
    model = make_model(balance_loss_weight=0.5, z_loss_weight=0.25)
    ids = make_ids(4)
    _, (output,) = gradients(model, [(ids, ids)])
    plain = model(ids, targets=ids)
    stats = plain.router.values()
    assert list(plain.router) == [0, 2]
    aux = sum(0.5 * layer.balance_loss + 0.25 * layer.z_loss for layer in stats)
    torch.testing.assert_close(output["loss"], plain.loss_sum / ids.numel() + aux)
    torch.testing.assert_close(output["loss_sum"], plain.loss_sum)
    assert not any(value.requires_grad for layer in output["router"].values() for value in layer)


def test_micro_batches_weigh_by_their_targets():
    model = make_model(balance_loss_weight=0.5, z_loss_weight=0.25)
    ids = make_ids(4)
    targets = ids.clone()
    targets[2:, 1:] = -100  # 12 targets in the first half, 2 in the second
    assert_same(gradients(model, halves(ids, targets))[0], expected(model, halves(ids, targets)))


def test_accumulation_changes_the_balance_loss_only_since_that_is_a_statistic_of_a_batch():
    """The z-loss is a mean over tokens: two halves give what the whole gives. The balance loss multiplies two means."""
    ids = make_ids(4)
    model = make_model(balance_loss_weight=0.0, z_loss_weight=0.25)
    assert_same(gradients(model, halves(ids, ids))[0], gradients(model, [(ids, ids)])[0])
    model = make_model(balance_loss_weight=0.5, z_loss_weight=0.0)
    split, whole = (gradients(model, batches)[0] for batches in (halves(ids, ids), [(ids, ids)]))
    assert_same(split, expected(model, halves(ids, ids)))
    assert any(float((a - b).abs().max()) > 1e-6 for a, b in zip(split, whole, strict=True))


# ---- the bias


def test_the_bias_moves_towards_experts_with_less_than_the_mean_and_stays_centred():
    bias = torch.zeros(4)
    move_bias(bias, torch.tensor([10, 1, 1, 4]), 0.1)  # mean 4: signs -1, 1, 1, 0, their mean 0.25
    torch.testing.assert_close(bias, torch.tensor([-0.125, 0.075, 0.075, -0.025]))
    for _ in range(1000):
        move_bias(bias, torch.tensor([10, 1, 1, 4]), 0.1)
    assert abs(float(bias.mean())) < 1e-4 * float(bias.abs().max())
    even = torch.tensor([0.5, -0.5, 0.25, -0.25])
    move_bias(even, torch.tensor([3, 3, 3, 3]), 0.1)
    assert even.tolist() == [0.5, -0.5, 0.25, -0.25]


class Driver:
    """Lightning's calls of a callback, for one process."""

    def __init__(self, model, log_every: int, ranks: int = 1, reduce=lambda tensor, reduce_op: tensor) -> None:
        self.lines: list[str] = []
        self.layers = routers_of(model)
        self.callback = RouterCallback(self.layers, log_every, self.lines.append)
        self.optimizer = HybridOptimizer(model_groups(model, OptimConfig()), OptimConfig())
        self.optimizer.refused = False
        strategy = SimpleNamespace(reduce=reduce)
        self.trainer = SimpleNamespace(global_step=0, world_size=ranks, strategy=strategy, optimizers=[self.optimizer])
        self.callback.on_train_start(self.trainer, SimpleNamespace(device=torch.device("cpu")))

    def step(self, *micro_batches: dict[int, RouterStats]) -> None:
        for i, stats in enumerate(micro_batches):
            self.trainer.global_step += i == len(micro_batches) - 1
            self.callback.on_train_batch_end(self.trainer, None, {"router": stats}, None, i)


def stats_of(counts: list[int], balance: float = 1.0, z: float = 2.0) -> dict[int, RouterStats]:
    """The same of both layers."""
    row = RouterStats(torch.tensor(balance), torch.tensor(z), torch.tensor(0.0), torch.tensor(counts))
    return {0: row, 2: row}


def biases(model) -> list[list[float]]:
    return [moe.gate.e_score_correction_bias.tolist() for moe in routers_of(model).values()]


def test_the_bias_moves_once_per_step_by_the_counts_of_all_its_micro_batches():
    model = make_model()
    driver = Driver(model, 10)
    driver.step(stats_of([9, 1, 3, 3]), stats_of([1, 9, 3, 3]), stats_of([3, 1, 2, 2]))  # 13, 11, 8, 8: mean 10
    assert biases(model) == [pytest.approx([-0.1, -0.1, 0.1, 0.1])] * 2
    driver.step(stats_of([0, 4, 2, 2]))
    assert biases(model) == [pytest.approx([0.0, -0.2, 0.1, 0.1])] * 2


def test_the_loads_of_a_refused_step_move_no_bias():
    model = make_model()
    driver = Driver(model, 10)
    driver.optimizer.refused = True
    driver.step(stats_of([9, 1, 3, 3]))
    assert biases(model) == [[0.0] * 4] * 2
    driver.optimizer.refused = False
    driver.step(stats_of([9, 1, 3, 3]))  # mean 4
    assert biases(model) == [pytest.approx([-0.15, 0.05, 0.05, 0.05])] * 2


def test_rate_zero_and_softmax_routers_have_no_bias_to_move():
    model = make_model(bias_update_rate=0.0)
    Driver(model, 10).step(stats_of([9, 1, 3, 3]))
    assert biases(model) == [[0.0] * 4] * 2
    softmax = make_model(router="softmax")
    before = {name: tensor.clone() for name, tensor in softmax.state_dict().items()}
    Driver(softmax, 10).step(stats_of([9, 1, 3, 3]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in softmax.state_dict().items())


# ---- what is logged


def test_metrics_are_those_of_the_interval_and_relative_to_the_mean():
    driver = Driver(make_model(), 2)
    driver.step(stats_of([8, 0, 0, 0], balance=2.0, z=1.0))
    driver.step(stats_of([0, 4, 4, 0], balance=1.0, z=3.0))
    metrics = driver.callback.metrics(driver.trainer)
    want = {"max_load": 2.0, "dead": 1, "balance_loss": 1.5, "z_loss": 2.0, "load": [2.0, 1.0, 1.0, 0.0]}
    assert metrics == {f"moe/{layer}/{name}": value for layer in (0, 2) for name, value in want.items()}
    driver.step(stats_of([1, 1, 1, 1]))
    assert driver.callback.metrics(driver.trainer)["moe/2/load"] == [1.0] * 4, "a new interval began"


def test_a_look_within_an_interval_does_not_end_it():
    """The first step is logged too, whatever log_every is."""
    driver = Driver(make_model(), 3)
    driver.step(stats_of([8, 0, 0, 0]))
    assert driver.callback.metrics(driver.trainer)["moe/0/dead"] == 3
    assert driver.lines == []
    driver.step(stats_of([0, 4, 4, 0]))
    driver.step(stats_of([0, 0, 0, 8]))
    load = driver.callback.metrics(driver.trainer)["moe/0/load"]
    assert load == pytest.approx([8 / 6, 4 / 6, 4 / 6, 8 / 6], abs=1e-4)
    assert driver.lines == []


def test_a_warning_names_layer_and_experts_once_until_the_layer_recovers():
    driver = Driver(make_model(), 2)

    def interval(*counts: list[int]) -> list[str]:
        driver.lines.clear()
        for row in counts:
            driver.step({0: stats_of(row)[0], 2: stats_of([1, 1, 1, 1])[2]})
        driver.callback.metrics(driver.trainer)
        return list(driver.lines)

    (line,) = interval([2, 0, 2, 0], [1, 0, 3, 0])
    assert "layer 0" in line
    assert "2 of 4 experts (1, 3)" in line
    assert "2 steps" in line
    assert "model.moe.bias_update_rate" in line
    assert interval([2, 0, 2, 0], [2, 0, 2, 0]) == [], "said already"
    assert interval([2, 0, 2, 0], [0, 2, 0, 2]) == [], "every expert had a token in the interval"
    assert len(interval([1, 1, 2, 0], [1, 1, 2, 0])) == 1, "it had recovered"


# ---- several processes, without Lightning: DDP, its check for unused parameters, and the bias on each rank


def rank_main(rank: int, ranks: int, port: int, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.save(two_steps(rank, ranks), folder / f"{ranks}-{rank}.pt")
    # DDP is gone by now. Were it the last to hold the group, it would end the group's threads with the interpreter's
    # lock in its hand, and one of them may be waiting for that lock.
    dist.destroy_process_group()


def two_steps(rank: int, ranks: int) -> dict:
    """Two steps of two micro-batches; a second forward fails if a parameter had no gradient in the first."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = make_model()
    for moe in routers_of(model).values():
        moe.gate.weight.data[3] = 0.0
        moe.gate.e_score_correction_bias[3] = -5.0  # one expert gets no token on any rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the successor of broadcast_buffers is not in torch 2.11
        wrapped = DistributedDataParallel(
            model, broadcast_buffers=False
        )  # nothing but the callback keeps the biases equal

    def reduce(tensor: Tensor, reduce_op: str) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    driver = Driver(model, 10, ranks, reduce)
    for step in range(2):
        outputs = []
        for micro in range(2):
            ids = make_ids(4, seed=2 * step + micro).chunk(ranks)[rank]
            output = wrapped(ids, targets=ids)
            (output.loss_sum + output.aux * output.n_tokens).backward()
            outputs.append(
                {layer: RouterStats(*[value.detach() for value in stats]) for layer, stats in output.router.items()}
            )
        driver.step(*outputs)
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    metrics = driver.callback.metrics(driver.trainer)
    return {"biases": torch.tensor(biases(model)), "missing": missing, "metrics": metrics}


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        assert run_ranks(lambda rank, port, ranks=ranks: rank_main(rank, ranks, port, folder), ranks) == [0] * ranks
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def test_every_parameter_has_a_gradient_on_every_rank(by_ranks):
    assert all(rank["missing"] == [] for rank in by_ranks.values())
    assert all(rank["metrics"]["moe/0/dead"] == 1 for rank in by_ranks.values())


def test_the_bias_is_equal_on_both_ranks_and_to_that_of_one_process_with_the_whole_batch(by_ranks):
    assert float((by_ranks["2-0"]["biases"][:, :3] - by_ranks["2-0"]["biases"][:, :1]).abs().max()) > 0.05
    assert torch.equal(by_ranks["2-0"]["biases"], by_ranks["2-1"]["biases"])
    assert torch.equal(by_ranks["2-0"]["biases"], by_ranks["1-0"]["biases"])


def test_metrics_are_of_all_ranks(by_ranks):
    one, two, other = (by_ranks[key]["metrics"] for key in ("1-0", "2-0", "2-1"))
    assert two == other
    for name, value in one.items():
        if not name.endswith("balance_loss"):  # a statistic of each rank's own micro-batch
            assert two[name] == pytest.approx(value, rel=1e-6), name


# ---- whole runs

MOE = ["model.pattern=T:moe M:moe", "model.moe.n_experts=4", "model.moe.d_expert=24", "model.moe.bias_update_rate=0.02"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_its_routers_and_resumes_bit_for_bit(tiny, tmp_path):
    """ckpt_every is a multiple of log_every, so that not even an interval of counts is lost."""
    config = compose_config([*tiny, *MOE, "model.moe.router=sigmoid", "trainer.accumulate=2", "optim=muon"])
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config, whole, None)
    logged = rows(whole.path)
    for row in logged:
        for layer in (0, 1):
            assert sum(row[f"moe/{layer}/load"]) == pytest.approx(4, abs=1e-3)
            assert row[f"moe/{layer}/max_load"] == pytest.approx(max(row[f"moe/{layer}/load"]), abs=1e-4)
            assert row[f"moe/{layer}/dead"] == row[f"moe/{layer}/load"].count(0.0)
            assert row[f"moe/{layer}/balance_loss"] > 0.5
            assert row[f"moe/{layer}/z_loss"] > 0
    with whole.metrics_csv.open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [float(row["train/loss"]) for row in table] == [row["train/loss"] for row in logged]
    state = load_run(str(whole.path), torch.device("cpu")).model.state_dict()
    assert all(float(state[f"blocks.{layer}.ffn.gate.e_score_correction_bias"].abs().max()) > 0 for layer in (0, 1))

    shutil.copytree(whole.path, broken.path)
    broken.step_checkpoint(12).unlink()
    run(config, broken, broken.step_checkpoint(8))
    assert [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows(broken.path)] == [
        {key: value for key, value in row.items() if not key.startswith("perf/")} for row in logged
    ]
    ours, theirs = (read_checkpoint(folder.step_checkpoint(12)) for folder in (broken, whole))
    assert all(torch.equal(ours["state_dict"][name], tensor) for name, tensor in theirs["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(tiny, tmp_path, environment, strategy):
    """Without the balance loss, which is a statistic of each rank's batch; the z-loss and the bias are the same."""
    steps = ["model.moe.router=sigmoid", "model.moe.balance_loss_weight=0", "model.moe.z_loss_weight=0.01"]
    steps += ["optim=adamw", "optim.eps=1e-3", "trainer.max_steps=3", "trainer.log_every=1", "trainer.val_every=null"]
    arguments = [
        *tiny,
        *MOE,
        *steps,
        "trainer.devices=2",
        f"trainer.strategy={strategy}",
        f"hydra.run.dir={tmp_path}/two",
    ]
    done = subprocess.run(
        [sys.executable, str(TRAIN), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = RunFolder(tmp_path / "one")
    run(compose_config([*tiny, *MOE, *steps]), one, None)
    for mine, its in zip(rows(tmp_path / "two"), rows(one.path), strict=True):
        assert mine["train/loss"] == pytest.approx(its["train/loss"], rel=1e-5)
        assert mine["optim/grad_norm"] == pytest.approx(its["optim/grad_norm"], rel=1e-4)
        for layer in (0, 1):
            assert mine[f"moe/{layer}/load"] == its[f"moe/{layer}/load"]
    two = load_run(str(tmp_path / "two"), torch.device("cpu")).model.state_dict()
    for name, tensor in load_run(str(one.path), torch.device("cpu")).model.state_dict().items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)

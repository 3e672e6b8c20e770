"""What a validation measures beside the loss: sums of answers, their logging by length, and when probes run."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.model.build import fresh_model
from hybridlm.train.validation import InContextProbes, TaskAccuracy, answer_sums, validation_score


def test_the_sums_count_answers_and_whole_examples():
    logits = torch.zeros(3, 4, 5)
    targets = torch.tensor([[-100, 1, 2, -100], [3, -100, -100, 4], [-100] * 4])  # the last row fills up
    logits[0, 1, 1] = logits[0, 2, 2] = logits[1, 0, 3] = logits[1, 3, 0] = 9.0
    nats, answers, right, examples, whole = answer_sums(logits, targets).tolist()
    assert (answers, right, examples, whole) == (4, 3, 2, 1)
    assert nats == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum"))
    )


class Module(SimpleNamespace):
    """The part of a LightningModule that callbacks use; ``logged`` is what they logged."""

    def log_dict(self, metrics, logger, sync_dist):
        self.logged |= metrics


@pytest.fixture
def module(tiny) -> Module:
    model = fresh_model(compose_config(tiny).model, 257, seed=0, device="cpu").eval()
    return Module(model=model, device="cpu", logged={})


@pytest.fixture
def trainer() -> SimpleNamespace:
    precision = SimpleNamespace(val_step_context=contextlib.nullcontext)
    strategy = SimpleNamespace(reduce=lambda sums, reduce_op: sums)
    return SimpleNamespace(precision_plugin=precision, strategy=strategy, state=SimpleNamespace(fn="fit"))


@torch.no_grad()
def test_accuracy_is_logged_by_length_and_that_of_the_training_length_without(module, trainer):
    accuracy = TaskAccuracy([8, 12])
    accuracy.on_validation_epoch_start(trainer, module)
    want = {}
    for loader, length in enumerate((8, 12)):
        ids = torch.arange(3 * length).reshape(3, length)
        targets = module.model(ids).logits.argmax(-1)  # right, but for one of four
        targets[0, 1] += 1
        targets[:, 2:4] = -100
        targets[2] = -100
        accuracy.on_validation_batch_end(trainer, module, None, {"ids": ids, "targets": targets}, 0, loader)
        answers = 2 * (length - 2)
        want |= {f"val/accuracy/{length}": 1 - 1 / answers, f"val/exact/{length}": 0.5}
    accuracy.on_validation_epoch_end(trainer, module)
    assert {name: value for name, value in module.logged.items() if "loss" not in name} == pytest.approx(
        want | {"val/accuracy": want["val/accuracy/8"], "val/exact": 0.5}
    )
    assert {name for name in module.logged if "loss" in name} == {"val/loss/8", "val/loss/12"}


def test_probes_run_at_multiples_of_their_interval_and_at_the_end(module, trainer, tiny):
    config = compose_config([*tiny, "callbacks=probes", "callbacks.probes.examples=2", "callbacks.probes.length=32"])
    probes = InContextProbes(config.callbacks.probes, 4, byte_tokenizer())
    ran = []
    for step, stage in ((2, "fit"), (4, "fit"), (5, "validate")):
        module.logged.clear()
        trainer.global_step, trainer.state.fn = step, stage
        probes.on_validation_epoch_end(trainer, module)
        ran.append("probe/induction/loss" in module.logged)
    assert ran == [False, True, True]


def test_validations_are_ranked_by_bits_per_byte_if_there_are_any():
    assert validation_score(SimpleNamespace(callback_metrics={"val/loss": torch.tensor(2.0)})) == 2.0
    both = {"val/loss": torch.tensor(2.0), "val/bpb": torch.tensor(1.0)}
    assert validation_score(SimpleNamespace(callback_metrics=both)) == 1.0

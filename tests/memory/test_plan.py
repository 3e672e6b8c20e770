"""What a plan chooses, what it refuses, and what it says."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.cli.verbs import run_app
from hybridlm.errors import UserError
from hybridlm.machine.device import CUDA, DeviceFacts, usable_bytes
from hybridlm.memory.plan import plan_inference, plan_run
from hybridlm.memory.report import full_text, json_text, refusal, summary_lines
from hybridlm.memory.suggest import suggestions
from hybridlm.memory.timeline import AVERAGE, EXCHANGE, GRADIENTS, OPTIMIZER, WEIGHTS
from hybridlm.memory.vocabulary import planned_vocabulary
from hybridlm.model.build import build_model
from hybridlm.model.count import parameters, state_bytes

CARD = ["hardware=rtx4060", "size=tiny", "data.seq_len=256", "data.global_batch=32"]
LARGE = [
    "model=hybrid_alternating",
    "size=small",
    "data.tokenizer.vocab_size=32768",
    "hardware=rtx4060",
    "hardware.memory_gb=1.6",
    "data.global_batch=8",
]


def test_the_default_run_on_a_cpu_is_cut_as_before():
    plan = plan_run(compose_config(["hardware=cpu"]))
    assert (plan.batch_size, plan.accumulate, plan.checkpoint_blocks, plan.loss_rows) == (8, 1, 0, 512)
    assert plan.fits
    assert plan.precision == "32-true"


def test_a_card_that_is_not_here_is_planned_without_asking_for_one(monkeypatch):
    for name in ("get_device_properties", "current_device", "get_device_capability", "init"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("asked for a device"))
    plan = plan_run(compose_config(CARD))
    assert (plan.precision, plan.device) == ("bf16-mixed", "NVIDIA GeForce RTX 4060")
    assert plan.limit_bytes < 8 * 2**30
    assert plan.tokens_per_s > 0


@pytest.mark.parametrize(("share", "cheaper"), [(0.9, "more"), (0.35, "less")])
def test_less_memory_cuts_the_step(share, cheaper):
    """What fits exactly is planned as it is; below, micro-batches get smaller or layers are computed again, and the
    plan holds."""
    base = [
        "hardware=cpu",
        "model.pattern=(T M)*3",
        "model.d_model=128",
        "model.attention.n_heads=4",
        "data.global_batch=16",
    ]
    free = plan_run(compose_config(base))
    gib = (free.reserved_bytes * share) / 2**30 + 1.0  # a GiB is taken for what is not the run's
    held = plan_run(compose_config([*base, f"hardware.memory_gb={gib}"]))
    assert held.fits
    assert held.reserved_bytes <= held.limit_bytes
    assert held.batch_size * held.accumulate == 16
    assert (held.batch_size, held.checkpoint_blocks) != (free.batch_size, free.checkpoint_blocks)
    assert held.peak.bytes < free.peak.bytes


def test_what_the_user_fixed_is_kept():
    fixed = ["data.batch_size=4", "trainer.checkpoint_blocks=2", "trainer.loss_rows=64"]
    plan = plan_run(compose_config([*CARD, *fixed]))
    assert (plan.batch_size, plan.accumulate, plan.checkpoint_blocks, plan.loss_rows) == (4, 8, 2, 64)
    assert plan_run(compose_config([*CARD, "trainer.accumulate=2"])).batch_size == 16


def test_parts_are_those_of_the_model_and_its_optimizer():
    config = compose_config(["hardware=cpu", "optim=adamw", "callbacks=ema", "size=tiny"])
    plan = plan_run(config)
    numbers = parameters(build_model(config.model, 512))
    parts = plan.peak.parts
    assert plan.parameters == numbers
    assert (parts[WEIGHTS], parts[GRADIENTS], parts[AVERAGE]) == (4 * numbers, 4 * numbers, 4 * numbers)
    tensors = len(list(build_model(config.model, 512).parameters()))
    assert parts[OPTIMIZER] == 8 * numbers + 4 * tensors  # two moments, and each tensor's own count of steps
    assert sum(parts.values()) == plan.peak.bytes


@pytest.mark.parametrize(("optim", "bytes_each"), [("sgd", 4), ("lion", 4), ("adamw", 8), ("adamw8bit", 2)])
def test_optimizer_states(optim, bytes_each):
    plan = plan_run(compose_config(["hardware=rtx4090", "model=transformer", "size=small", f"optim={optim}"]))
    assert plan.peak.parts[OPTIMIZER] == pytest.approx(bytes_each * plan.parameters, rel=0.04)


def test_several_devices():
    base = ["hardware=cpu", "size=tiny", "optim=adamw", "data.global_batch=8"]
    one = plan_run(compose_config([*base, "data.global_batch=4"]))
    ddp = plan_run(compose_config([*base, "trainer.devices=2"]))
    assert (ddp.batch_size, ddp.global_batch) == (4, 8)
    assert ddp.peak.bytes == one.peak.bytes + ddp.peak.parts[EXCHANGE]
    assert ddp.peak.parts[EXCHANGE] == one.peak.parts[WEIGHTS]
    sharded = plan_run(compose_config([*base, "trainer.devices=2", "trainer.strategy=fsdp2"]))
    assert sharded.peak.parts[WEIGHTS] == one.peak.parts[WEIGHTS] // 2
    assert sharded.peak.parts[OPTIMIZER] == one.peak.parts[OPTIMIZER] // 2


def test_precisions_of_weights():
    narrow = plan_run(compose_config([*CARD, "trainer.precision=bf16-true"]))
    wide = plan_run(compose_config([*CARD, "trainer.precision=32-true"]))
    assert wide.peak.parts[WEIGHTS] / 2 <= narrow.peak.parts[WEIGHTS] < wide.peak.parts[WEIGHTS] * 0.6


@pytest.mark.parametrize(
    ("overrides", "ids", "bound"),
    [
        ([], 4096, True),
        (["data.tokenizer.kind=bytes"], 257, False),
        (["data.tokenizer.kind=bytes", "data.tokenizer.special_tokens=['<|a|>']"], 258, False),
        (["model.vocab_size=5000"], 5000, False),
    ],
)
def test_vocabulary_before_the_data(overrides, ids, bound):
    assert planned_vocabulary(compose_config(overrides)) == (ids, bound)


def test_a_tokenizer_file_is_read_and_a_missing_one_is_a_line(tmp_path):
    from hybridlm.data.tokenizer import byte_tokenizer

    byte_tokenizer().save(tmp_path / "tokenizer.json")
    assert planned_vocabulary(
        compose_config(["data.tokenizer.kind=file", f"data.tokenizer.path={tmp_path / 'tokenizer.json'}"])
    ) == (
        257,
        False,
    )
    with pytest.raises(UserError, match=r"nowhere\.json"):
        planned_vocabulary(compose_config(["data.tokenizer.kind=file", "data.tokenizer.path=nowhere.json"]))


def test_each_suggestion_makes_it_fit():
    config = compose_config(LARGE)
    plan = plan_run(config)
    assert not plan.fits
    found = suggestions(config, plan)
    assert len(found) == 3
    for item in found:
        followed = plan_run(compose_config([*LARGE, *item.change.overrides]))
        assert followed.fits, item.change.overrides
        assert followed.tokens_per_s >= 0.9 * item.tokens_per_s
    needs, *lines = refusal(plan, found)
    assert "this run needs" in needs
    assert len(lines) == 3
    kinds = [item.change.same_model for item in found]
    assert kinds == sorted(kinds, reverse=True)


def test_what_the_user_fixed_is_set_free_first():
    config = compose_config(
        ["model=transformer", "size=d12", "hardware=rtx4060", "data.batch_size=64", "data.seq_len=1024"]
    )
    plan = plan_run(config)
    assert not plan.fits
    assert plan.checkpoint_blocks == 1  # left to the plan, and not enough
    assert ("data.batch_size=auto",) in [item.change.overrides for item in suggestions(config, plan)]


def test_inference_side():
    config = compose_config(["model=hybrid_alternating", "size=d12", "hardware=rtx4060"])
    side = plan_inference(config)
    model = build_model(config.model, config.data.tokenizer.vocab_size)
    assert side.weights == 2 * parameters(model)
    for context in side.contexts:
        assert context.cache == state_bytes(model, context.tokens, 1, torch.bfloat16)
        assert (
            context.attention == 12 * 2 * context.tokens * 768 * 2
        )  # keys and values of d_model channels each, two bytes
    ratios = [context.cache / context.attention for context in side.contexts]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == pytest.approx(0.5, abs=0.01)
    assert all(context.decode > 0 and context.prefill > 0 for context in side.contexts)


def test_text_and_json():
    config = compose_config(CARD)
    plan, side = plan_run(config), plan_inference(config)
    text = full_text(plan, side)
    for part in plan.peak.parts:
        assert part in text
    assert "not measured" in text
    assert len(summary_lines(plan)) <= 3
    fields = json.loads(json_text(plan, side, []))
    assert fields["peak_bytes"] == plan.peak.bytes == sum(fields["parts"].values())
    assert fields["suggestions"] == []
    assert fields["inference"]["contexts"]


def test_memory_that_a_run_may_take():
    card = DeviceFacts(CUDA, "card", memory_gb=8.0, capability="8.6", shared_memory_kb=99, bf16=True)
    assert 7 * 2**30 < usable_bytes(card, None) < 8 * 2**30
    assert math.isclose(usable_bytes(DeviceFacts("cpu", "CPU", None, None, None, True), 3.0), 2 * 2**30)


def plan_command(*words: str) -> int | None:
    with pytest.raises(SystemExit) as end:
        run_app(["plan", *words])
    return end.value.code


def test_the_command_refuses_in_lines_and_ends_with_code_2(capfd):
    assert plan_command(*LARGE, "--json") == 2
    said = capfd.readouterr()
    assert json.loads(said.out)["fits"] is False
    assert len(said.err.splitlines()) == 4
    assert all(line.startswith("config error: ") for line in said.err.splitlines())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--jsn", "size=tiny"), "error: unknown option --jsn; legal: --json"),
        (("ckpt=last",), "ckpt = 'last'"),
        (("data.global_batch=10", "data.batch_size=4"), "is not a multiple of data.batch_size"),
    ],
)
def test_the_command_names_a_mistake(capfd, words, line):
    assert plan_command(*words) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert line in said

"""Callbacks by what a run leaves behind: sampled text, the running average of the weights, an early end; each also
after a resume."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.errors import UserError
from hybridlm.runs.checkpoint import EMA_KEY, load_run, read_checkpoint
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.callbacks import EMA, EarlyStop
from hybridlm.train.run import run

CPU = torch.device("cpu")


def rows(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_jsonl.read_text().splitlines()]


@pytest.fixture(scope="module")
def everything(tiny) -> list[str]:
    return [
        *tiny,
        "model.pattern=MT:moe",
        "callbacks.ema.decay=0.8",
        "callbacks.samples.every=2",
        "callbacks.early_stop.patience=9",
    ]


@pytest.fixture(scope="module")
def finished(everything, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("run") / "a")
    run(compose_config(everything), folder, None)
    return folder


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory) -> RunFolder:
    """The same run without any callback."""
    folder = RunFolder(tmp_path_factory.mktemp("run") / "plain")
    run(compose_config([*tiny, "model.pattern=MT:moe", "callbacks=none"]), folder, None)
    return folder


def test_callbacks_do_not_change_the_training(finished, plain):
    for ours, theirs in zip(rows(finished), rows(plain), strict=True):
        assert {name: ours.get(name) for name in ("step", "train/loss", "val/bpb")} == {
            name: theirs.get(name) for name in ("step", "train/loss", "val/bpb")
        }
    weights = [load_run(str(folder.path), CPU).model.state_dict() for folder in (finished, plain)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_samples_during_training_come_every_second_validation(finished):
    """Validations at 4, 8 and 12. The last text is by another way: from the checkpoint."""
    assert [path.name for path in finished.samples_at(0).parent.iterdir()] == ["step-00000008.txt"]
    texts = finished.samples_at(8).read_text().split("\n\n----------------\n\n")
    assert [
        text.startswith(prompt) for text, prompt in zip(texts, ("import", "class", "def __init__(self"), strict=True)
    ] == [True] * 3
    assert finished.samples.exists()


# ---- the running average


def test_the_average_follows_the_weights_after_each_step(tiny, tmp_path):
    """Against the definition, by hand, from a checkpoint of every step."""
    folder = RunFolder(tmp_path / "run")
    steps = [
        "trainer.max_steps=4",
        "trainer.ckpt_every=1",
        "trainer.keep_last=9",
        "trainer.val_every=null",
        "callbacks.samples.prompts=[]",
    ]
    run(compose_config([*tiny, *steps, "callbacks.ema.decay=0.25"]), folder, None)
    contents = [read_checkpoint(folder.step_checkpoint(step)) for step in range(1, 5)]
    for before, now, step in zip(contents, contents[1:], range(2, 5), strict=False):
        keep = min(0.25, (1 + step) / (10 + step))
        for name, average in now[EMA_KEY].items():
            want = keep * before[EMA_KEY][name] + (1 - keep) * now["state_dict"][f"model.{name}"]
            torch.testing.assert_close(average, want, rtol=1e-5, atol=1e-7)
            assert average.dtype == torch.float32


def test_the_average_loads_differs_and_validates_as_logged(finished):
    last, average = load_run(str(finished.path), CPU), load_run(str(finished.path), CPU, ema=True)
    own = read_checkpoint(finished.newest_checkpoint())
    names = dict(average.model.named_parameters())
    assert set(own[EMA_KEY]) == set(names)
    assert all(torch.equal(own[EMA_KEY][name], parameter) for name, parameter in names.items())
    assert not torch.equal(average.model.embedding.weight, last.model.embedding.weight)
    validated = [row for row in rows(finished) if "val/bpb" in row]
    assert all(0 < row["val/ema_bpb"] != row["val/bpb"] for row in validated)
    summary = json.loads(finished.summary.read_text())
    assert summary["val/ema_bpb"] == validated[-1]["val/ema_bpb"]


def test_the_logged_value_is_that_of_the_loaded_average(finished, everything):
    """By the loaded model on the held-out text, another path than the callback's."""
    from hybridlm.data.preparing.prepare import prepare

    loaded = load_run(str(finished.path), CPU, ema=True)
    (part,) = prepare(compose_config(everything).data).parts
    tokens = torch.from_numpy(part.val.stream.read(0, len(part.val.stream)))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 64):
            window = tokens[start : start + 65]
            nats += float(loaded.model(window[None, :-1], targets=window[None, 1:]).loss_sum)
    bpb = nats / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() / part.val.text_bytes
    assert json.loads(finished.summary.read_text())["val/ema_bpb"] == pytest.approx(bpb, rel=1e-5)


def test_loading_the_average_of_a_run_without_one_is_refused(plain):
    with pytest.raises(UserError, match="no running average"):
        load_run(str(plain.path), CPU, ema=True)


def test_a_resumed_run_has_the_same_average_and_the_same_validations(finished, everything, tmp_path):
    broken = RunFolder(tmp_path / "broken")
    shutil.copytree(finished.path, broken.path)
    run(compose_config(everything), broken, broken.step_checkpoint(8))
    names = ("step", "train/loss", "val/bpb", "val/ema_bpb")
    assert [{name: row.get(name) for name in names} for row in rows(broken)] == [
        {name: row.get(name) for name in names} for row in rows(finished)
    ]
    ours, theirs = (read_checkpoint(folder.step_checkpoint(12)) for folder in (broken, finished))
    assert all(torch.equal(ours[EMA_KEY][name], tensor) for name, tensor in theirs[EMA_KEY].items())
    assert ours["callbacks"] == theirs["callbacks"]
    assert "EarlyStop" in theirs["callbacks"]


def test_a_resume_may_drop_or_add_the_average_and_early_stopping(finished, plain, tiny, everything, tmp_path, recwarn):
    without, begun = RunFolder(tmp_path / "without"), RunFolder(tmp_path / "begun")
    shutil.copytree(finished.path, without.path)
    run(
        compose_config([*tiny, "model.pattern=MT:moe", "callbacks=none", "trainer.max_steps=14"]),
        without,
        without.newest_checkpoint(),
    )
    assert EMA_KEY not in read_checkpoint(without.newest_checkpoint())
    assert not [warning for warning in recwarn if "callbacks" in str(warning.message)]
    shutil.copytree(plain.path, begun.path)
    run(compose_config([*everything, "trainer.max_steps=14"]), begun, begun.newest_checkpoint())
    assert EMA_KEY in read_checkpoint(begun.newest_checkpoint())


def test_the_first_steps_forget_the_initial_weights_quickly():
    model = torch.nn.Linear(1, 1, bias=False)
    module = SimpleNamespace(model=model)
    average, trainer = EMA(0.999), SimpleNamespace(global_step=0)
    torch.nn.init.zeros_(model.weight)
    average.on_train_start(trainer, module)
    torch.nn.init.ones_(model.weight)
    for step in (1, 1, 2):  # the second is a micro-batch without a step
        trainer.global_step = step
        average.on_train_batch_end(trainer, module, None, None, 0)
    assert average._model is not None
    assert float(average._model.weight) == pytest.approx(1 - (2 / 11) * (3 / 12))


# ---- the early end


def test_a_run_that_stops_improving_ends_at_a_validation_with_all_its_files(tiny, tmp_path):
    folder = RunFolder(tmp_path / "run")
    changes = ["trainer.max_steps=100", "callbacks.early_stop.patience=2", "callbacks.early_stop.min_delta=50"]
    config = compose_config([*tiny, *changes])
    run(config, folder, None)
    assert rows(folder)[-1]["step"] == 12, "the first validation is at 4, two without a gain of 50 bits follow"
    assert folder.newest_checkpoint() == folder.step_checkpoint(12)
    summary = json.loads(folder.summary.read_text())
    assert (summary["steps"], summary["tokens"]) == (12, 12 * 128)
    assert folder.samples.exists()
    stopped = read_checkpoint(folder.newest_checkpoint())["callbacks"]["EarlyStop"]
    assert stopped["best_score"] == pytest.approx(rows(folder)[2]["val/bpb"])
    assert stopped["wait_count"] == 2
    # Interrupted between the two it counts on, and ends where it would have.
    folder.step_checkpoint(12).unlink()
    run(config, folder, folder.step_checkpoint(8))
    assert rows(folder)[-1]["step"] == 12


def test_what_counts_as_an_improvement():
    said: list[str] = []
    state = SimpleNamespace(fn="fit")
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = SimpleNamespace(
        state=state, strategy=strategy, fast_dev_run=False, sanity_checking=False, current_epoch=0
    )

    def ends(stop: EarlyStop, scores: list[float]) -> list[bool]:
        trainer.should_stop, found = False, []
        for trainer.global_step, score in enumerate(scores, start=1):
            trainer.callback_metrics = {"val/bpb": torch.tensor(score)}
            stop.on_validation_end(trainer, None)
            found.append(trainer.should_stop)
        return found

    stop = EarlyStop("val/bpb", 2, 0.1, said.append)
    assert ends(stop, [2.0, 1.95, 1.85, 1.9, 1.8]) == [False, False, False, False, True]
    (line,) = said
    assert all(part in line for part in ("step 5", "val/bpb", "1.8500", "2 validations"))
    assert ends(EarlyStop("val/bpb", 1, 0.1, said.append), [float("nan")]) == [True]
    resumed = EarlyStop("val/bpb", 4, 0.1, said.append)
    resumed.load_state_dict(stop.state_dict())
    assert ends(resumed, [1.8, 1.76, 1.7, 1.75]) == [False, True, True, True], "patience is the current one"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ["callbacks.ema.decay=0.9", "trainer.strategy=fsdp2", "optim=adamw"],
            r"callbacks\.ema\.decay = 0\.9: .*fsdp2",
        ),
        (
            ["callbacks.samples.every=2", "trainer.strategy=fsdp2", "optim=adamw"],
            r"callbacks\.samples\.every = 2: .*fsdp2",
        ),
        (
            ["callbacks.early_stop.patience=2", "trainer.val_every=null"],
            r"callbacks\.early_stop\.patience = 2: counts validations",
        ),
        (["callbacks.ema.decay=1.0"], r"callbacks\.ema\.decay"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(tiny, changes, says):
    with pytest.raises(UserError, match=says) as refused:
        compose_config([*tiny, *changes])
    assert len(refused.value.problems) == 1

"""Tasks of lm-evaluation-harness: ours to the last digit of brute force, and those that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from brute_force import bpe_tokenizer, brute, greedy_text, model_of, pair_ids

from hybridlm.errors import UserError

pytest.importorskip("lm_eval")
TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return model_of(tiny, tokenizer)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The tasks of this folder, where they find their data; nothing is asked of the network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("hybridlm.data.reading.hub_access.hub_answers", lambda: False)
    copy = shutil.copytree(TASKS, tmp_path / "tasks")
    for path in copy.glob("*.yaml"):
        path.write_text(path.read_text().replace("{folder}", str(copy)))
    return copy


def test_local_tasks_give_the_numbers_of_brute_force(model, tokenizer, folder):
    from hybridlm.eval.tasks import load_tasks, run_tasks

    tasks = load_tasks(["local_choice", "local_write"], folder)
    found = run_tasks(model, tokenizer, tasks, 64, 4, None, None)

    right = normed = 0
    questions = [json.loads(line) for line in (TASKS / "choice.jsonl").read_text().splitlines()]
    for question in questions:
        sums = [brute(model, *pair_ids(tokenizer, question["question"], choice))[0] for choice in question["choices"]]
        right += sums.index(max(sums)) == question["answer"]
        by_length = [nats / len(choice) for nats, choice in zip(sums, question["choices"], strict=True)]
        normed += by_length.index(max(by_length)) == question["answer"]
    assert found["local_choice"]["acc"] == right / len(questions)
    assert found["local_choice"]["acc_norm"] == normed / len(questions)
    assert found["local_choice"]["examples"] == len(questions)

    wanted = [json.loads(line) for line in (TASKS / "write.jsonl").read_text().splitlines()]
    texts = [
        greedy_text(model, tokenizer, [tokenizer.eos_id, *tokenizer.encode(line["prompt"])], ["\n", "+"], 12)
        for line in wanted
    ]
    exact = [text == line["answer"] for text, line in zip(texts, wanted, strict=True)]
    assert found["local_write"]["exact_match"] == sum(exact) / len(wanted)


def test_generated_answers_that_are_right_are_counted(model, tokenizer, folder):
    """The same task with the model's own greedy texts as the answers of all but one."""
    from hybridlm.eval.tasks import load_tasks, run_tasks

    lines = [json.loads(line) for line in (TASKS / "write.jsonl").read_text().splitlines()]
    for line in lines[:-1]:
        prompt = [tokenizer.eos_id, *tokenizer.encode(line["prompt"])]
        line["answer"] = greedy_text(model, tokenizer, prompt, ["\n", "+"], 12)
    lines[-1]["answer"] = "nothing that it would write"
    (folder / "write.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run_tasks(model, tokenizer, load_tasks(["local_write"], folder), 64, 2, None, None)
    assert found["local_write"]["exact_match"] == 0.75
    assert (
        run_tasks(model, tokenizer, load_tasks(["local_write"], folder), 64, 2, 2, None)["local_write"]["examples"] == 2
    )


def test_rolling_text_of_a_task(model, tokenizer, folder):
    from hybridlm.eval.tasks import load_tasks, run_tasks

    found = run_tasks(model, tokenizer, load_tasks(["local_text"], folder), 64, 4, None, None)["local_text"]
    texts = [json.loads(line)["prompt"] for line in (TASKS / "write.jsonl").read_text().splitlines()]
    nats = sum(brute(model, [tokenizer.eos_id], tokenizer.encode(text))[0] for text in texts)
    assert found["bits_per_byte"] == pytest.approx(
        -nats / sum(len(text.encode()) for text in texts) / 0.6931471805599453, rel=1e-9
    )


def test_tasks_that_cannot_be_loaded(folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    from hybridlm.eval import tasks

    def refusal(path):
        with pytest.raises(UserError) as caught:
            tasks.load_tasks(["local_choice"], path)
        (line,) = caught.value.problems
        assert "\n" not in line
        return line

    assert "nowhere" in refusal(folder / "nowhere")
    (folder / "choice.jsonl").unlink()
    assert "local_choice" in refusal(folder)

    def unreachable(self, names):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    line = refusal(folder)
    assert "local_choice" in line
    assert "hub is unreachable" in line
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'hybridlm[eval]'" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        "task: local_choice\n\tbroken: [",
        "task: local_choice\ndataset_path: !!python/object/apply:os.mkdir [ran]",
        "task: local_choice\ndataset_path: &a [*a]",
        "task: local_choice",
        "task: local_choice\ndataset_path: json\noutput_type: magic",
        "task: local_choice\ninclude: nowhere.yaml",
        "[local_choice]",
        "\x00",
    ],
)
def test_a_task_file_that_is_none_is_one_line(folder, text, monkeypatch):
    """And no code of it is run."""
    from lm_eval.tasks import TaskManager

    from hybridlm.eval.tasks import load_tasks

    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path, include_defaults=0: TaskManager(include_path=include_path, include_defaults=False),
    )  # indexing the harness's own tasks takes seconds
    monkeypatch.chdir(folder)
    (folder / "choice.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_tasks(["local_choice"], folder)
    (line,) = caught.value.problems
    assert "\n" not in line
    assert not (folder / "ran").exists()


@pytest.mark.slow
def test_unknown_tasks_name_near_ones(folder):
    from hybridlm.eval.tasks import load_tasks

    with pytest.raises(UserError) as caught:
        load_tasks(["arc_eazy", "local_choise", "zzzzz"], folder)
    first, second, third = caught.value.problems
    assert "did you mean arc_easy" in first
    assert "local_choice" in second
    assert "unknown task" in third

"""lm-evaluation-harness through the adapter: log-likelihoods and texts that equal brute force, and tasks of our own to
the last digit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hybridlm.cli.compose import compose_config
from hybridlm.data.tokenizer import byte_tokenizer, train_bpe
from hybridlm.errors import UserError
from hybridlm.eval.scoring import Continuation, loglikelihoods
from hybridlm.model.build import fresh_model

pytest.importorskip("lm_eval")
TASKS = Path(__file__).parent / "tasks"
TEXT = ["def f0(x):\n    return x * 3 + 1\n", "import os  # of the system\n", "class Number:\n    value = 12\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    """With merges, so that the border between context and continuation may fall inside a token."""
    return train_bpe(TEXT, 300)


def model_of(tiny, tokenizer, dtype=torch.float64):
    config = compose_config(
        [*tiny, "model.pattern=MTM3L:moe", "model.mamba3.d_state=8", "model.mamba3.head_dim=16", *MLA]
    )
    return fresh_model(config.model, tokenizer.vocab_size, seed=3, device="cpu").to(dtype).eval()


MLA = [
    "model.mla.n_heads=2",
    "model.mla.kv_lora_rank=8",
    "model.mla.qk_nope_head_dim=8",
    "model.mla.qk_rope_head_dim=8",
]
MLA += ["model.mla.v_head_dim=8", "model.moe.n_experts=4", "model.moe.d_expert=16"]


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return model_of(tiny, tokenizer)


def harness(model, tokenizer, max_length=64, batch=4):
    from hybridlm.eval.harness import HarnessLM

    return HarnessLM(model, tokenizer, max_length=max_length, batch=batch)


def asked(*arguments):
    return SimpleNamespace(args=arguments)


@torch.inference_mode()
def brute(model, context, continuation, max_length=64):
    """(log-likelihood, greedy) token by token, each from a forward of its own over at most ``max_length`` tokens before
    it.

    The window is that of the whole request, as in the harness: its last max_length inputs.
    """
    ids = (context + continuation)[-(max_length + 1) :]
    total, greedy = 0.0, True
    for place in range(len(ids) - len(continuation), len(ids)):
        logits = model(torch.tensor([ids[:place]]), keep="last").logits[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[place]])
        greedy = greedy and int(logits.argmax()) == ids[place]
    return total, greedy


PAIRS = [
    ("def f0", "(x):"),
    ("def f0(x):\n    return", " x * 3"),
    ("def f0(x):\n    return ", "x * 3"),  # the blank goes over to the continuation
    ("import o", "s  # of the system"),  # inside a token
    ("class Number", ":"),
    ("", "import os"),
    ("x " * 100, "def f0(x)"),  # longer than the window
    ("ü", "☃ 你好"),
]


def pair_ids(tokenizer, context, continuation):
    """As the harness documents it: blanks at the end of the context belong to the continuation, and the whole is cut
    behind the context."""
    kept = context.rstrip()
    whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(kept)
    return [tokenizer.eos_id, *alone], whole[len(alone) :]


def test_log_likelihoods_of_a_ragged_batch_are_those_of_single_tokens(model, tokenizer):
    found = harness(model, tokenizer).loglikelihood([asked(*pair) for pair in PAIRS], disable_tqdm=True)
    for (context, continuation), (nats, greedy) in zip(PAIRS, found, strict=True):
        expected = brute(model, *pair_ids(tokenizer, context, continuation))
        assert nats == pytest.approx(expected[0], abs=1e-9), (context, continuation)
        assert greedy == expected[1]


def test_in_float32_too(tiny, tokenizer):
    model = model_of(tiny, tokenizer, torch.float32)
    found = harness(model, tokenizer).loglikelihood([asked(*pair) for pair in PAIRS], disable_tqdm=True)
    for (context, continuation), (nats, _) in zip(PAIRS, found, strict=True):
        assert nats == pytest.approx(brute(model, *pair_ids(tokenizer, context, continuation))[0], abs=2e-3)


def test_what_greedy_decoding_writes_is_called_greedy(model, tokenizer):
    """The text of a few greedy tokens, asked for as a continuation."""
    prompt = [tokenizer.eos_id, *tokenizer.encode("def f0")]
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids]), keep="last").logits[0, -1].argmax()))
    other = (*ids[:-1], (ids[-1] + 1) % tokenizer.vocab_size)
    found = loglikelihoods(model, [Continuation(tuple(ids), 5), Continuation(other, 5), Continuation(tuple(ids), 0)], 2)
    assert [greedy for _, greedy in found] == [True, False, True]
    assert found[2][0] == 0.0


@pytest.mark.parametrize("max_length", [8, 64])
def test_whole_texts(model, tokenizer, max_length):
    """Windows side by side, each token once, the last window with the tokens before it as the harness rolls it."""
    texts = [TEXT[0] + TEXT[1], "x", TEXT[2] * 3]
    found = harness(model, tokenizer, max_length=max_length).loglikelihood_rolling([asked(text) for text in texts])
    for text, total in zip(texts, found, strict=True):
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        expected, done = 0.0, 1
        while done < len(ids):
            count = min(max_length, len(ids) - done)
            end = done + count
            first = max(0, end - max_length - 1) if done > 1 else 0
            expected += brute(model, ids[first:done], ids[done:end], max_length)[0]
            done = end
        assert total == pytest.approx(expected, abs=1e-9)


def greedy_text(model, tokenizer, prompt, until, most):
    ids, new = list(prompt), []
    with torch.inference_mode():
        while len(new) < most:
            token = int(model(torch.tensor([ids]), keep="last").logits[0, -1].argmax())
            if token == tokenizer.eos_id:
                break
            new.append(token)
            ids.append(token)
    text = tokenizer.decode(new)
    for stop in until:
        text = text.split(stop)[0]
    return text


def test_generation_is_greedy_text_up_to_the_first_stop(model, tokenizer):
    contexts = ["def f0", "import os", "class Number:\n   ", "x " * 60]
    lm = harness(model, tokenizer, max_length=64)
    plain = lm.generate_until([asked(context, {"until": [], "max_gen_toks": 16}) for context in contexts])
    for context, text in zip(contexts, plain, strict=True):
        prompt = [tokenizer.eos_id, *tokenizer.encode(context)][-48:]
        assert text == greedy_text(model, tokenizer, prompt, [], 16)
    stops = [text[2:4] for text in plain]
    cut = lm.generate_until(
        [asked(context, {"until": [stop], "max_gen_toks": 16}) for context, stop in zip(contexts, stops, strict=True)]
    )
    assert cut == [text.split(stop)[0] for text, stop in zip(plain, stops, strict=True)]


def test_a_setting_that_is_not_known_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="num_beams"):
        harness(model, tokenizer).generate_until([asked("x", {"until": ["\n"], "num_beams": 4})])


def test_an_empty_continuation_is_refused(model, tokenizer):
    """It would count as certain, and win."""
    with pytest.raises(UserError, match="empty"):
        harness(model, tokenizer).loglikelihood([asked("the", " that"), asked("the", "")])


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


def test_bytes_have_the_same_borders(tiny):
    tokenizer = byte_tokenizer()
    model = model_of(tiny, tokenizer)
    (found,) = harness(model, tokenizer).loglikelihood([asked("ab", "c")], disable_tqdm=True)
    assert found[0] == pytest.approx(brute(model, [tokenizer.eos_id, 97, 98], [99])[0], abs=1e-9)

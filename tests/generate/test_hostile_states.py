"""States and conversations that a stranger made, with a right checksum: refused in a line, or a state that goes on."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from hostile import VALUES, mutated, refused_or_read
from safetensors.torch import load_file, safe_open, save_file
from small_models import small_config, small_model

from hybridlm.data.chat import template_of
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.files.sealed import digest
from hybridlm.generate.conversation import Conversation
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.generate.state_file import KEY, load_state, save_state
from hybridlm.model.build import fresh_model

TOKENIZER = byte_tokenizer(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
SAMPLING = Sampling(temperature=0, max_new_tokens=3)


@pytest.fixture(scope="module")
def model():
    return small_model(small_config("M1 T W M2 L M3"), torch.float32)


@pytest.fixture(scope="module")
def talking():
    return fresh_model(small_config("MT", variants={}), TOKENIZER.vocab_size, seed=0, device="cpu").eval()


def opened(path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY]), load_file(path)


def write(path, facts, tensors) -> None:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, path, {KEY: text, "sha256": digest(text, tensors)})


def go_on(path, model) -> None:
    state, _ = load_state(path, model)
    list(Engine(model, None).run(state, [SAMPLING] * len(state.ids)))


def strange_tensor(generator: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    return generator.choice(
        [
            lambda: tensor[:0],
            lambda: torch.cat([tensor, tensor]),
            lambda: tensor.to(torch.float64) if tensor.dtype != torch.float64 else tensor.float(),
            lambda: (
                torch.full_like(tensor, -(2**62))
                if not tensor.is_floating_point()
                else torch.full_like(tensor, float("nan"))
            ),
            lambda: tensor + 1,
            lambda: tensor.flatten(),
            lambda: torch.zeros(0, 2**40),
            lambda: tensor.long(),
            lambda: torch.zeros((), dtype=torch.bool),
        ]
    )()


@pytest.mark.parametrize(
    "seed", [pytest.param(range(200), id="200"), pytest.param(range(200, 5000), id="4800", marks=pytest.mark.slow)]
)
def test_a_mutated_state_is_refused_in_a_line_or_goes_on(model, tmp_path, seed):
    engine = Engine(model, None)
    for name, prompts in (("one", [[1, 5, 9, 2, 2, 7]]), ("rows", [[1, 5], [3], [4, 4, 4]])):
        save_state(tmp_path / name, engine.prefill(prompts), model)
        go_on(tmp_path / name, model)
    for number in seed:
        generator = random.Random(number)
        facts, tensors = opened(tmp_path / generator.choice(["one", "rows"]))
        if generator.random() < 0.6:
            facts = mutated(facts, generator, lambda g: copy.deepcopy(g.choice(VALUES)))
        if generator.random() < 0.6:
            name = generator.choice(sorted(tensors))
            tensors[name] = strange_tensor(generator, tensors[name])
        elif generator.random() < 0.3:
            tensors[generator.choice(["x", "layers.9.k", "last_doc", "\x1b"])] = tensors.pop(
                generator.choice(sorted(tensors))
            )
        write(tmp_path / "a", facts, tensors)
        refused_or_read(lambda: go_on(tmp_path / "a", model))


@pytest.mark.parametrize(
    "facts",
    [
        {"rows": [10**9] * 3}, {"rows": [1] * 10**6}, {"rows": [6, 0]}, {"rows": [-1, 7]}, {"rows": []},
        {"rows": "6"}, {"rows": [6.0]},
        {"room": 0}, {"room": "x"}, {"note": 3}, {"format_version": "1"}, {"model": None}, {"more": 1},
    ],
)  # fmt: skip
def test_facts_that_are_not_its_own_are_refused(model, tmp_path, facts):
    save_state(tmp_path / "a", Engine(model, None).prefill([[1, 5, 9, 2, 2, 7]]), model)
    own, tensors = opened(tmp_path / "a")
    write(tmp_path / "a", own | facts, tensors)
    assert not refused_or_read(lambda: go_on(tmp_path / "a", model))


def test_the_room_that_a_file_asks_for_is_not_taken(model, tmp_path):
    save_state(tmp_path / "a", Engine(model, None).prefill([[1, 5, 9, 2, 2, 7]], room=50), model)
    own, tensors = opened(tmp_path / "a")
    write(tmp_path / "a", own | {"room": 2**31 - 1}, tensors)
    assert refused_or_read(lambda: go_on(tmp_path / "a", model))


def test_a_mutated_conversation_is_refused_or_goes_on(talking, tmp_path):
    def conversation() -> Conversation:
        engine = Engine(talking, TOKENIZER, context=256)
        return Conversation(engine, TOKENIZER, template_of(TOKENIZER), SAMPLING, lambda line: None)

    first = conversation()
    first.reset("be brief")
    for text in ("hello", "???"):
        list(first.say(text))
    first.save(tmp_path / "a")
    facts, tensors = opened(tmp_path / "a")

    def load(note: str) -> None:
        write(tmp_path / "b", facts | {"note": note}, tensors)
        again = conversation()
        again.load(tmp_path / "b")
        list(again.say("x" * 120))
        list(again.say("y" * 120))  # the oldest messages go

    load(facts["note"])
    said = json.loads(facts["note"])
    for number in range(150):
        generator = random.Random(number)
        changed = mutated(said, generator, lambda g: copy.deepcopy(g.choice(VALUES)))
        refused_or_read(lambda changed=changed: load(json.dumps(changed)))
    for turns in (
        [["user", "a"]],
        [["assistant", "a"]],
        [["tool", "a"]],
        [["user", "\ud800"], ["assistant", ""]],
        [["system", "a"]] * 2,
    ):
        with pytest.raises(UserError, match="conversation"):
            load(json.dumps(said | {"turns": turns}))
    with pytest.raises(UserError, match="conversation"):
        load(json.dumps(said | {"open": [10**6]}))

"""The engine, turn by turn: every answer is the one computed alone, whoever joins, leaves, or has been there before."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch
from small_models import VOCAB, every_pattern, small_config, small_model

from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.model.build import fresh_model
from hybridlm.serve import engine as serve_engine
from hybridlm.serve.engine import ServeEngine
from hybridlm.serve.limits import Limits
from hybridlm.serve.prefixes import Node, Prefixes


class Desk:
    """An engine driven by hand, and what it delivered by job."""

    def __init__(self, model, **limits) -> None:
        self.steps = defaultdict(list)
        self.engine = ServeEngine(model, byte_tokenizer(), Limits(**{"context": 200, "chunk": 8} | limits), self.take)

    def take(self, steps) -> None:
        for job, step in steps:
            self.steps[job].append(step)

    def submit(self, ids, sampling, marks=()):
        job = self.engine.job(ids, sampling, marks=marks)
        assert self.engine.submit([job])
        return job

    def finish(self) -> None:
        while self.engine.busy:
            self.engine.turn()

    def ids(self, job) -> list[int]:
        return [step.id for step in self.steps[job]]


def requests(count: int, seed: int, vocab: int = VOCAB):
    """Prompts of which many begin alike, with options of every sort."""
    rng = random.Random(seed)
    shared = [[rng.randrange(vocab) for _ in range(30)] for _ in range(2)]
    made = []
    for place in range(count):
        ids = rng.choice(shared)[: rng.choice([0, 8, 20, 30])] + [
            rng.randrange(vocab) for _ in range(rng.randint(1, 20))
        ]
        options = rng.choice(
            [{}, {"temperature": 0}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 0.5}]
        )
        made.append((ids, Sampling(seed=place, max_new_tokens=rng.randint(1, 20), **options)))
    return made


@every_pattern
def test_an_answer_is_the_one_computed_alone(pattern):
    model, rng = small_model(small_config(pattern), torch.float32), random.Random(pattern)
    asked, desk, jobs = requests(12, 1), Desk(model, batch=5), []
    for ids, sampling in asked:
        jobs.append(desk.submit(ids, sampling, marks=(20,)))
        for _ in range(rng.randint(0, 3)):
            desk.engine.turn()
    desk.finish()
    alone = Engine(model, None)
    for job, (ids, sampling) in zip(jobs, asked, strict=True):
        lone = Desk(model, prefixes=0)
        only = lone.submit(ids, sampling)
        lone.finish()
        assert desk.ids(job) == lone.ids(only)
        assert desk.ids(job) == alone.generate([ids], [sampling])[0].ids
    assert sum(job.reused for job in jobs) > 0


def test_a_choice_that_rounding_could_decide_is_made_alone(monkeypatch):
    """However much rounding is assumed, up to reading everything again for every token."""
    model = small_model(small_config("MTM"), torch.float32)
    asked = requests(4, 2)
    results = []
    for noise in (0.0, 1e-3, 1.0):
        monkeypatch.setattr(serve_engine, "NOISE", noise)
        desk = Desk(model)
        jobs = [desk.submit(*one) for one in asked]
        desk.finish()
        results.append(([desk.ids(job) for job in jobs], desk.engine.rechecks))
    ids, rechecks = zip(*results, strict=True)
    assert ids[0] == ids[1] == ids[2]
    # The first token of an answer is chosen after reading alone, unless a prefix was taken over.
    assert rechecks[0] == 0 < rechecks[1] < rechecks[2]
    assert rechecks[2] >= sum(map(len, ids[0])) - len(asked)


def test_what_was_read_alone_is_not_read_again(monkeypatch):
    """A choice made alone costs the answer so far, not the prompt."""
    monkeypatch.setattr(serve_engine, "NOISE", 1.0)
    desk = Desk(small_model(small_config("MTM"), torch.float32))
    read = counted(desk.engine.model)
    job = desk.submit([1, 2, 3, 4] * 10 + [5], Sampling(max_new_tokens=12, seed=3))
    desk.finish()
    assert desk.engine.rechecks == 11
    alone = [*range(1, 8), *range(1, 5)]  # from token 41, and from the end of the piece that ends at 48
    assert sum(read) == 41 + sum(alone)
    assert job.reused == 0


def counted(model) -> list[int]:
    """The tokens of every forward from now on, one-token decoding aside."""
    forward, read = model.forward, []
    model.forward = lambda ids, *rest, **named: read.append(ids.shape[1]) or forward(ids, *rest, **named)
    return read


def test_rows_join_and_leave_between_tokens():
    desk = Desk(small_model(small_config("MTM"), torch.float32))
    long = desk.submit([1, 2], Sampling(max_new_tokens=30))
    for _ in range(5):
        desk.engine.turn()
    short = desk.submit([3], Sampling(max_new_tokens=2))
    desk.engine.turn()
    assert [len(desk.steps[job]) for job in (long, short)] == [7, 2]
    assert desk.engine.batch.jobs == [long]
    long.cancelled = True
    desk.engine.turn()
    assert not desk.engine.busy
    assert len(desk.steps[long]) == 7


def test_more_rows_than_are_decoded_together(monkeypatch):
    """In turns; none is left out, whoever leaves."""
    model = small_model(small_config("MTM"), torch.float32)
    asked = requests(11, 5)
    want = [one.ids for one in Engine(model, None).generate(*zip(*asked, strict=True))]
    monkeypatch.setattr(serve_engine, "_TOGETHER", 4)
    desk = Desk(model)
    jobs = [desk.submit(*one) for one in asked]
    desk.finish()
    assert [desk.ids(job) for job in jobs] == want


def test_a_long_prompt_does_not_stop_the_others():
    """About four pieces are read between two tokens."""
    desk = Desk(small_model(small_config("MTM"), torch.float32))
    writing = desk.submit([1], Sampling(max_new_tokens=60))
    desk.engine.turn()
    long = desk.submit([2] * 199, Sampling(max_new_tokens=1))
    turns = 0
    while not desk.steps[long]:
        before = len(desk.steps[writing])
        desk.engine.turn()
        turns += 1
        assert len(desk.steps[writing]) == before + 1
    assert turns >= 5
    late = desk.submit([3] * 170, Sampling(max_new_tokens=1))
    soon = desk.submit([4], Sampling(max_new_tokens=1))
    desk.engine.turn()
    assert desk.steps[soon]
    assert not desk.steps[late]


@pytest.mark.parametrize("pattern", ["MTM", "LWM3"])
def test_a_prefix_is_read_once(pattern):
    config = small_config(pattern.replace("M3", " M3"))
    desk = Desk(small_model(config, torch.float32))
    shared, read, counts = [1, 2, 3, 4, 5] * 7, counted(desk.engine.model), []
    for ending in ([6], [7, 8], [7, 8], [7, 8, 9]):
        read.clear()
        desk.submit(shared + ending, Sampling(max_new_tokens=1), marks=(35,))
        desk.finish()
        counts.append(sum(read))
    assert counts == [36, 2, 0, 1]


def test_a_conversation_goes_on_where_its_answer_ended():
    desk = Desk(small_model(small_config("MTM"), torch.float32))
    first = desk.submit([1] * 10, Sampling(max_new_tokens=9))
    desk.finish()
    second = desk.submit([1] * 10 + desk.ids(first) + [2, 3], Sampling(max_new_tokens=1))
    desk.finish()
    assert second.reused == 10 + 8  # the newest token is not in the state


def test_kept_prefixes_stay_within_their_limit():
    model = small_model(small_config("MTM"), torch.float32)
    desk = Desk(model, prefixes=20_000)
    for place in range(12):
        desk.submit([place] * 30, Sampling(max_new_tokens=20))
        desk.finish()
        prefixes = desk.engine.prefixes
        assert 0 < prefixes.bytes <= 20_000
        assert prefixes.bytes == sum(node.bytes for node in prefixes._used)


def test_prefixes_nested_deeper_than_calls():
    prefixes = Prefixes(1 << 20)
    node = prefixes.root
    for _ in range(5000):
        child = node.children[(1,)] = Node(node, (1,), [], None, exact=True)
        node = child
    assert prefixes.longest([1] * 5001) is node
    assert len(node.path()) == 5000


def test_memory_never_exceeds_the_context():
    """With a window beyond it: a layer's memory stays columns."""
    config = small_config("TM", attention=AttentionConfig(n_heads=2, rope=True, window=320))
    desk = Desk(small_model(config, torch.float32), context=300)
    jobs = [desk.submit([1] * 256, Sampling(seed=seed, max_new_tokens=40)) for seed in range(2)]
    desk.finish()
    again = desk.submit([1] * 256, Sampling(seed=0, max_new_tokens=40))
    desk.finish()
    assert desk.engine.batch.room <= 300
    assert desk.ids(again) == desk.ids(jobs[0])


def test_who_gives_up_waiting_frees_a_place():
    desk = Desk(small_model(small_config("M"), torch.float32), queue=2, batch=1)
    desk.submit([1], Sampling(max_new_tokens=50))
    desk.engine.turn()
    for job in [desk.submit([1], Sampling()) for _ in range(2)]:
        job.cancelled = True
    desk.engine.turn()
    assert not desk.engine.waiting


def test_the_queue_is_limited():
    desk = Desk(small_model(small_config("M"), torch.float32), queue=3)
    jobs = [desk.engine.job([1], Sampling(max_new_tokens=1)) for _ in range(4)]
    assert not desk.engine.submit(jobs)
    assert desk.engine.submit(jobs[:3])
    assert not desk.engine.submit(jobs[3:])
    with pytest.raises(UserError):
        desk.engine.job([1], Sampling(logit_bias={VOCAB: 1.0}))


def test_the_context_ends_an_answer():
    desk = Desk(small_model(small_config("MT"), torch.float32), context=20)
    job = desk.submit([1] * 15, Sampling(max_new_tokens=100))
    desk.finish()
    assert [step.finish for step in desk.steps[job]] == [None] * 4 + ["context"]


def test_a_failure_ends_the_answers_and_not_the_engine(capsys):
    desk = Desk(small_model(small_config("MT"), torch.float32))
    jobs = [desk.submit([1, 2], Sampling(max_new_tokens=50)), desk.submit([2] * 150, Sampling(max_new_tokens=50))]
    desk.engine.turn()
    desk.engine.batch.logits = lambda first, rows: 1 / 0
    desk.engine.turn()
    assert all(isinstance(desk.steps[job][-1], ZeroDivisionError) for job in jobs)
    assert not desk.engine.busy
    assert "ZeroDivisionError" in capsys.readouterr().err
    again = desk.submit([1, 2], Sampling(max_new_tokens=5))
    desk.finish()
    assert len(desk.ids(again)) == 5


def test_text_and_stop_strings():
    tokenizer = byte_tokenizer()
    model = fresh_model(small_config("MTM"), tokenizer.vocab_size, seed=0, device="cpu")
    desk = Desk(model)
    bias = {i: -1e9 for i in range(257) if chr(i) not in "ab"}
    job = desk.submit(tokenizer.encode("x"), Sampling(stop=("ab",), logit_bias=bias, max_new_tokens=50, logprobs=2))
    desk.finish()
    text = "".join(step.text for step in desk.steps[job])
    assert "ab" not in text
    assert desk.steps[job][-1].finish == "stop"
    assert all(len(step.logprob.top) == 2 for step in desk.steps[job])

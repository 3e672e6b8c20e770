"""The engine against the model's whole forward, computed anew at every step, over random compositions of every kind of
layer."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from small_models import PATTERNS, VOCAB, every_pattern, small_config, small_model

from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import RunFailed, UserError
from hybridlm.generate.engine import Completion, Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.model.build import fresh_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 1, 2, 6, 6], [1, 2, 3]]


def random_pattern(seed: int) -> str:
    """One to five layers of any kind, each with any FFN."""
    rng = random.Random(seed)
    layers = (
        rng.choice(["T", "W", "N", "L", "M1", "M2", "M3", "X"]) + rng.choice([":mlp", ":moe", ":none", ""])
        for _ in range(9)
    )
    return " ".join(list(layers)[: rng.randint(1, 5)])


def whole_forward(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("seed", range(30))
def test_decode_is_the_whole_forward(seed):
    """Greedy ids of unequal prompts are those of the whole forward at every step; logits agree to 1e-4, the prompts
    read in pieces."""
    model = small_model(small_config(random_pattern(seed)), torch.float32, seed)
    engine = Engine(model, None, prefill_chunk=random.Random(seed).choice([1, 3, 4, 512]))
    written = engine.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=12))
    for prompt, completion in zip(PROMPTS, written, strict=True):
        ids = list(prompt)
        for token in completion.ids:
            assert int(whole_forward(model, ids)[-1].argmax()) == token
            ids.append(token)
        assert (len(completion.ids), completion.finish) == (12, "length")

    forced = torch.randint(VOCAB, (12, len(PROMPTS)), generator=torch.Generator().manual_seed(seed))
    state = engine.prefill(PROMPTS, 23)
    logits = torch.stack([state.logits, *(engine.decode(state, tokens) for tokens in forced)], 1)
    for row, prompt in enumerate(PROMPTS):
        want = whole_forward(model, [*prompt, *forced[:, row].tolist()])[len(prompt) - 1 :]
        assert float((logits[row] - want).abs().max()) < 1e-4 * max(1.0, float(want.abs().max()))


@every_pattern
def test_a_row_is_the_same_in_every_batch(pattern):
    """The same seed and prompt give the same ids alone, among others, in any place, and where max_batch cuts the
    prompts."""
    model = small_model(small_config(pattern), torch.float32)
    samplings = [
        Sampling(temperature=1.3, top_p=0.9, seed=10 + i, max_new_tokens=n) for i, n in enumerate((7, 15, 3, 11))
    ]
    together = Engine(model, None, prefill_chunk=4).generate(PROMPTS, samplings)
    alone = [Engine(model, None).generate([p], [s])[0] for p, s in zip(PROMPTS, samplings, strict=True)]
    turned = Engine(model, None).generate(PROMPTS[::-1], samplings[::-1])[::-1]
    cut = Engine(model, None, max_batch=3).generate(PROMPTS, samplings)
    assert together == alone == turned == cut
    assert [len(one.ids) for one in together] == [7, 15, 3, 11]


def test_rows_of_one_sampling_draw_with_seeds_of_their_own():
    model = small_model(small_config("MTM"), torch.float32)
    engine = Engine(model, None)
    got = engine.generate([[1, 2]] * 3, Sampling(seed=5, temperature=2.0, max_new_tokens=20))
    assert len({tuple(one.ids) for one in got}) == 3
    assert got[2] == engine.generate([[1, 2]], Sampling(seed=7, temperature=2.0, max_new_tokens=20))[0]
    assert engine.generate([[1, 2]] * 3, Sampling(seed=5, temperature=2.0, max_new_tokens=20)) == got


def test_a_row_that_ended_leaves_the_batch():
    model = small_model(small_config("MTM"), torch.float32)
    engine, sizes = Engine(model, None), []
    state = engine.prefill([[1, 2], [3], [4, 5, 6]])
    samplings = [Sampling(temperature=0, max_new_tokens=n) for n in (5, 1, 3)]
    for step in engine.run(state, samplings):
        if step.row == 0:
            sizes.append(len(state.ids))
    assert sizes == [3, 2, 2, 1, 1]


def byte_model(pattern: str = "MTM"):
    """On bytes, so that text comes out."""
    tokenizer = byte_tokenizer()
    config = small_config(pattern)
    return fresh_model(config, tokenizer.vocab_size, seed=0, device="cpu"), tokenizer


def spoken(text: str) -> dict[int, float]:
    """A bias under which exactly these ASCII letters, in any order, are ever chosen."""
    return {i: -1e9 for i in range(257) if chr(i) not in text}


def test_streamed_text_is_that_of_the_ids():
    """Letters of several bytes come whole; what stays unfinished at the end is U+FFFD."""
    model, tokenizer = byte_model()
    sampling = Sampling(seed=3, max_new_tokens=60)
    engine = Engine(model, tokenizer)
    pieces = list(engine.stream([tokenizer.encode("ab")], sampling))
    text = "".join(step.text for step in pieces)
    assert text == tokenizer.decode([step.id for step in pieces])
    assert engine.generate([tokenizer.encode("ab")], sampling) == [
        Completion([step.id for step in pieces], text, None, "length")
    ]


@pytest.mark.parametrize("stop", [("bb",), ("aab", "ba"), ("a",), ("zz",), ("b", "abab")])
def test_a_row_ends_in_front_of_a_stop_string(stop):
    model, tokenizer = byte_model()
    engine, prompt = Engine(model, tokenizer), tokenizer.encode("ab bb aab")  # stop strings in the prompt do not count
    bias = spoken("ab")
    for seed in range(5):
        free = engine.generate([prompt], Sampling(seed=seed, logit_bias=bias, max_new_tokens=30))[0]
        steps = list(engine.stream([prompt], Sampling(seed=seed, logit_bias=bias, stop=stop, max_new_tokens=30)))
        ends = [end for end in range(1, 31) if any(text in free.text[:end] for text in stop)]
        end = ends[0] if ends else 30
        shown = free.text[:end]
        want = shown[: min(shown.find(text) for text in stop if text in shown)] if ends else shown
        assert "".join(step.text for step in steps) == want
        assert [step.id for step in steps] == free.ids[:end]
        assert steps[-1].finish == ("stop" if ends else "length")


def test_a_row_ends_in_front_of_a_stop_id():
    model, tokenizer = byte_model()
    engine, prompt = Engine(model, tokenizer), tokenizer.encode("x")
    bias = spoken("abcd")
    free = engine.generate([prompt], Sampling(seed=1, logit_bias=bias, max_new_tokens=40))[0]
    got = engine.generate([prompt], Sampling(seed=1, logit_bias=bias, max_new_tokens=40, stop_ids=(ord("c"), 0)))[0]
    assert "c" in free.text
    assert (got.text, got.finish) == (free.text[: free.text.index("c")], "stop")
    assert got.ids == tokenizer.encode(got.text)


def test_a_stopped_row_can_go_on():
    """After a stop id nothing is read twice and nothing is missing."""
    model, tokenizer = byte_model()
    engine = Engine(model, tokenizer)
    state = engine.prefill([tokenizer.encode("x")])
    list(engine.run(state, [Sampling(seed=1, logit_bias=spoken("abcd"), stop_ids=(ord("c"),))]))
    engine.extend(state, [tokenizer.encode("c")])
    want = whole_forward(model, state.ids[0])[-1]
    assert float((state.logits[0] - want).abs().max()) < 1e-4


def test_left_off_in_the_middle_the_state_holds_what_was_yielded():
    model = small_model(small_config("TWL M3"), torch.float32)
    engine = Engine(model, None)
    state = engine.prefill([[1, 2, 3]])
    seen = []
    for step in engine.run(state, [Sampling(seed=1, temperature=2.0)]):
        seen.append(step.id)
        if len(seen) == 6:
            break
    assert state.ids == [[1, 2, 3, *seen]]
    engine.extend(state, [[4, 5]])
    want = whole_forward(model, [1, 2, 3, *seen, 4, 5])[-1]
    assert float((state.logits[0] - want).abs().max()) < 1e-4 * max(1.0, float(want.abs().max()))


def test_a_window_keeps_a_bounded_cache():
    """Bytes stay where they are while the text grows past the window, also where the room was too small for it in the
    beginning."""
    model = small_model(small_config("M W W M"), torch.float32)
    engine = Engine(model, None)
    state = engine.prefill([[1, 2]], room=64)
    sizes = set()
    for _ in engine.run(state, [Sampling(temperature=0, max_new_tokens=200)]):
        sizes.add(state.cache.bytes)
    assert len(sizes) == 1
    assert len(state.ids[0]) == 202
    grown = engine.prefill([[1]])  # room for two tokens: less than the window of three
    for _ in engine.run(grown, [Sampling(temperature=0, max_new_tokens=50)]):
        pass
    assert grown.cache.bytes == state.cache.bytes


@pytest.mark.parametrize("pattern", PATTERNS)
def test_room_grows_in_every_kind_of_cache(pattern):
    """Rows of unequal lengths with room for what they hold, which then go on: logits of the whole forward all the
    way."""
    model = small_model(small_config(pattern), torch.float32)
    engine = Engine(model, None)
    state = engine.prefill([[1, 2, 3, 4], [5, 6]])
    for token in range(10):
        engine.extend(state, [[token], [token + 1]])
    for row, ids in enumerate(state.ids):
        want = whole_forward(model, ids)[-1]
        assert float((state.logits[row] - want).abs().max()) < 1e-4 * max(1.0, float(want.abs().max()))


def test_memory_is_taken_for_what_comes_not_for_what_may_come():
    model, tokenizer = byte_model()
    sampling = Sampling(temperature=0, max_new_tokens=10**30, logit_bias={256: -math.inf})
    stream = Engine(model, tokenizer).stream([[1, 2]], sampling)
    assert [next(stream).finish for _ in range(3)] == [None] * 3


def test_the_context_is_a_limit():
    model = small_model(small_config("MT"), torch.float32)
    engine = Engine(model, None, context=8)
    got = engine.generate([[1, 2, 3], [4] * 7], Sampling(temperature=0, max_new_tokens=20))
    assert [(len(one.ids), one.finish) for one in got] == [(5, "context"), (1, "context")]
    with pytest.raises(UserError, match="prompt: 8 tokens"):
        engine.generate([[4] * 8], Sampling())
    state = engine.prefill([[4] * 7])
    list(engine.run(state, [Sampling()]))
    with pytest.raises(UserError, match="context of 8"):
        list(engine.run(state, [Sampling()]))


def test_logprobs_are_those_of_the_model_whatever_the_sampling():
    model = small_model(small_config("MT"), torch.float32)
    sampling = Sampling(temperature=0.7, top_k=3, logit_bias={4: 2.0}, logprobs=2, max_new_tokens=6)
    (got,) = Engine(model, None).generate([[1, 2]], sampling)
    want = whole_forward(model, [1, 2, *got.ids]).log_softmax(-1)[1:-1]
    assert [one.id for one in got.logprobs] == got.ids
    for one, row in zip(got.logprobs, want, strict=True):
        assert one.logprob == pytest.approx(float(row[one.id]), abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_rows_may_sample_in_different_ways():
    model = small_model(small_config("MT"), torch.float32)
    samplings = [
        Sampling(temperature=0),
        Sampling(seed=4),
        Sampling(seed=4, repetition_penalty=3.0),
        Sampling(temperature=0, logprobs=1),
    ]
    engine = Engine(model, None)
    samplings = [replace(one, max_new_tokens=20) for one in samplings]
    together = engine.generate([[1, 2]] * 4, samplings)
    assert [one.ids for one in together] == [engine.generate([[1, 2]], [one])[0].ids for one in samplings]
    assert [one.logprobs is None for one in together] == [True, True, True, False]


def test_misuse_is_an_error():
    model, tokenizer = byte_model("M")
    engine = Engine(model, None)
    with pytest.raises(ValueError, match="new token"):
        engine.generate([[1], []], Sampling())
    with pytest.raises(ValueError, match="need a tokenizer"):
        engine.generate([[1]], Sampling(stop=("a",)))
    with pytest.raises(ValueError, match="2 samplings for 1"):
        engine.generate([[1]], [Sampling(), Sampling()])
    with pytest.raises(UserError, match="logit_bias: id 257"):
        engine.generate([[1]], Sampling(logit_bias={257: 1.0}))
    with pytest.raises(UserError, match="every id"):
        engine.generate([[1]], Sampling(logit_bias=dict.fromkeys(range(257), -math.inf)))
    with torch.no_grad():
        model.embedding.weight[3] = torch.nan
    with pytest.raises(RunFailed, match="finite"):
        Engine(model, tokenizer).generate([[3]], Sampling())

"""The adapter to lm-evaluation-harness: log-likelihoods and texts that equal brute force."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from brute_force import TEXT, bpe_tokenizer, brute, greedy_text, model_of, pair_ids

from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.eval.losses import Continuation, loglikelihoods

pytest.importorskip("lm_eval")

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


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return model_of(tiny, tokenizer)


def harness(model, tokenizer, max_length=64, batch=4):
    from hybridlm.eval.harness import HarnessLM

    return HarnessLM(model, tokenizer, max_length=max_length, batch=batch)


def asked(*arguments):
    return SimpleNamespace(args=arguments)


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


def test_bytes_have_the_same_borders(tiny):
    tokenizer = byte_tokenizer()
    model = model_of(tiny, tokenizer)
    (found,) = harness(model, tokenizer).loglikelihood([asked("ab", "c")], disable_tqdm=True)
    assert found[0] == pytest.approx(brute(model, [tokenizer.eos_id, 97, 98], [99])[0], abs=1e-9)

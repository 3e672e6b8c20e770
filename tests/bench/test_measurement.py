"""One measurement: the bytes of the cache, the rounds that count, and what is left out with its reason."""

from __future__ import annotations

import pytest
import torch

from hybridlm.bench import measurement
from hybridlm.bench.measurement import Measurement, Round, measure, unmeasured, untrained
from hybridlm.bench.report import rows
from hybridlm.cli.compose import compose_config
from hybridlm.machine.device import inference_device


@pytest.fixture(scope="module")
def models(tiny):
    small = [*tiny, "model.mla.n_heads=2", "model.mamba3.d_state=8", "model.mamba3.head_dim=16", "hardware=cpu"]
    device = torch.device("cpu")
    return {
        pattern: untrained(compose_config([*small, f"model.pattern={pattern}"]), device, torch.float32)
        for pattern in ("T", "MT", "M1 M3", "L")
    }


@pytest.mark.parametrize(("batch", "context"), [(1, 5), (3, 40)])
def test_allocated_bytes_are_the_counted_ones(models, batch, context):
    for name, engine in models.items():
        point = unmeasured(name, engine, batch, context)
        assert point.cache_bytes == point.cache_bytes_measured > 0
        assert not point.left_out


def test_models_take_turns_and_the_warm_up_does_not_count(models, monkeypatch):
    order: list[str] = []
    real = measurement._round

    def noted(engine, point, new_tokens, budget):
        order.append(point.model)
        return real(engine, point, new_tokens, budget)

    monkeypatch.setattr(measurement, "_round", noted)
    points = measure(models, 2, 20, new_tokens=4, rounds=3, budget=1e6)
    names = list(models)
    assert order == [*names[::-1], *names, *names[::-1], *names], "in turn, in reverse order every second round"
    assert [point.model for point in points] == names
    for point in points:
        assert len(point.rounds) == 3, "four rounds, of which the first is a warm-up"
        assert all(len(one.tokens) == 4 for one in point.rounds)
        figures = point.figures()
        assert figures["token_s_p50"] <= figures["token_s_p90"] <= figures["token_s_p99"]


def test_what_is_timed_is_the_whole_prompt_and_every_token(models, monkeypatch):
    """Beside a clock that counts its calls: the model reads the prompt in chunks, then one token at a time."""
    engine = models["MT"]
    monkeypatch.setattr(engine, "prefill_chunk", 8)
    read: list[int] = []
    handle = engine.model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].shape[1]))
    decode = engine.decode
    monkeypatch.setattr(engine, "decode", lambda state, tokens: (read.append(len(tokens)), decode(state, tokens))[1])
    try:
        measurement._round(engine, unmeasured("MT", engine, 1, 20), 3, 1e6)
    finally:
        handle.remove()
    assert read == [8, 8, 4, 1, 1, 1]


def test_figures_of_rounds():
    point = Measurement(
        "a",
        4,
        100,
        1,
        1,
        1,
        rounds=[Round(0.5, (0.1, 0.3), 7), Round(2.0, (0.2, 0.2), 9), Round(1.0, (0.1, 0.1), None)],
    )
    figures = point.figures()
    assert figures["first_token_s"] == 1.0
    assert figures["prefill_tokens_per_s"] == 400.0
    assert figures["decode_tokens_per_s"] == pytest.approx(4 / 0.2)
    assert (figures["token_s_p50"], figures["token_s_p90"], figures["peak_bytes"]) == (0.1, 0.3, 9)
    assert Measurement("a", 1, 1, 1, 1, 1).figures() == {}


def test_percentiles_are_measured_values():
    values = tuple(float(value) for value in range(1, 101))
    figures = Measurement("a", 1, 1, 1, 1, 1, rounds=[Round(1.0, values[::-1], None)]).figures()
    assert [figures[f"token_s_p{share}"] for share in (50, 90, 99)] == [50, 90, 99]


def test_ratios_are_taken_round_by_round():
    fast = Measurement(
        "b", 1, 1, 1, 1, 1, rounds=[Round(1.0, (1.0,), None), Round(1.0, (10.0,), None), Round(1.0, (3.0,), None)]
    )
    slow = Measurement(
        "a", 1, 1, 1, 1, 1, rounds=[Round(1.0, (2.0,), None), Round(1.0, (20.0,), None), Round(1.0, (9.0,), None)]
    )
    assert fast.decode_ratio(slow) == (2.0, 2.0, 3.0)
    assert fast.decode_ratio(Measurement("c", 1, 1, 1, 1, 1)) is None
    first, second = rows([slow, fast])
    assert "decode_ratio" not in first
    assert (second["decode_ratio"], second["decode_ratio_high"]) == (2.0, 3.0)


def test_what_takes_too_long_says_how_far_it_came(models, monkeypatch):
    engine = models["T"]
    monkeypatch.setattr(engine, "prefill_chunk", 8)
    (point,) = measure({"T": engine}, 1, 64, new_tokens=4, rounds=2, budget=1e-9)
    assert "8 of 64" in point.left_out
    assert point.rounds == []
    monkeypatch.setattr(engine, "prefill_chunk", 64)
    (point,) = measure({"T": engine}, 1, 64, new_tokens=4, rounds=2, budget=1e-9)
    assert "1 of 4" in point.left_out


def test_free_memory_is_that_of_the_machine():
    free = measurement.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_what_does_not_fit_says_so(models, monkeypatch):
    monkeypatch.setattr(measurement, "free_bytes", lambda device: 10)
    (point,) = measure({"T": models["T"]}, 1, 64, new_tokens=2, rounds=1, budget=1e6)
    assert point.left_out.startswith("does not fit: a cache of")
    assert point.cache_bytes_measured is None
    monkeypatch.setattr(measurement, "free_bytes", lambda device: None)

    def full(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes\nmore")

    monkeypatch.setattr(measurement, "_round", full)
    (point,) = measure({"T": models["T"]}, 1, 64, new_tokens=2, rounds=1, budget=1e6)
    assert point.left_out.startswith("does not fit: DefaultCPUAllocator")

    def broken(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(measurement, "_round", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        measure({"T": models["T"]}, 1, 64, new_tokens=2, rounds=1, budget=1e6)


def test_the_vocabulary_is_that_of_the_tokenizer(tiny, corpus):
    def ids(*overrides) -> int:
        return untrained(compose_config([*tiny, *overrides]), inference_device(), torch.float32).model.vocab_size

    assert ids() == 257
    assert ids("data.tokenizer.special_tokens=['<|a|>','<|b|>']") == 259
    assert ids("data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=700") == 700
    assert ids("data.tokenizer.kind=file", f"data.tokenizer.path={corpus}/tokenizer.json") == 257

"""The pattern grammar: what each form means, what each mistake says, and that no text breaks it."""

from __future__ import annotations

import random
import time
from itertools import groupby

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybridlm.config.pattern import Letters, parse
from hybridlm.errors import ConfigError

LETTERS = Letters(variants={"S": "attention", "X": "mamba3"})


def spelled_out(layers):
    """Text that parses to ``layers``, FFNs included: ``M2:none*3 T:mlp``."""
    return " ".join(f"{layer.letter}:{layer.ffn}*{len(list(run))}" for layer, run in groupby(layers))


def short(pattern, n_layers=None, letters=LETTERS):
    return " ".join(f"{item.letter}:{item.ffn}" for item in parse(pattern, n_layers, letters)[0])


@pytest.mark.parametrize(
    ("pattern", "n_layers", "meaning"),
    [
        ("T", None, "T:mlp"),
        ("transformer mamba", None, "T:mlp M2:none"),
        ("TMM", None, "T:mlp M2:none M2:none"),
        ("M1M2M3", None, "M1:none M2:none M3:mlp"),
        ("mamba1 mamba3 mla", None, "M1:none M3:mlp L:mlp"),
        ("SX", None, "S:mlp X:mlp"),
        ("T:moe M:mlp M3:none", None, "T:moe M2:mlp M3:none"),
        ("T:moeM", None, "T:moe M2:none"),
        ("T*2 M*3", None, "T:mlp T:mlp M2:none M2:none M2:none"),
        ("TM*2", None, "T:mlp M2:none M2:none"),
        ("M2*2", None, "M2:none M2:none"),
        ("(TM)*2", None, "T:mlp M2:none T:mlp M2:none"),
        ("(T*2 M:mlp) * 2", None, "T:mlp T:mlp M2:mlp T:mlp T:mlp M2:mlp"),
        ("(TM)M", None, "T:mlp M2:none M2:none"),
        ("T*60% M*40%", 5, "T:mlp T:mlp T:mlp M2:none M2:none"),
        ("T*33.3% M*33.3% L*33.3%", 3, "T:mlp M2:none L:mlp"),
        (["T", "T", "M"], None, "T:mlp T:mlp M2:none"),
        (("T:moe", "mamba*2"), None, "T:moe M2:none M2:none"),
        (["T*50%", "M*50%"], 2, "T:mlp M2:none"),
        ("TM", 3, "T:mlp M2:none T:mlp"),
        ("TMM", 2, "T:mlp M2:none"),
        (None, 2, "T:mlp T:mlp"),
    ],
)
def test_meaning(pattern, n_layers, meaning):
    assert short(pattern, n_layers) == meaning


@pytest.mark.parametrize("n_layers", range(1, 40))
def test_shares_sum_to_n_layers(n_layers):
    layers = parse("T*37% M*41% L*22%", n_layers, LETTERS)[0]
    assert len(layers) == n_layers
    for kind, share in (("attention", 0.37), ("mamba2", 0.41), ("mla", 0.22)):
        assert abs(sum(layer.kind == kind for layer in layers) - share * n_layers) < 1


def test_ssm_and_ffn_after_decide_what_letters_mean():
    letters = Letters("mamba1", {"attention": "none", "mamba1": "mlp"})
    assert short("TM", letters=letters) == "T:none M1:mlp"


@pytest.mark.parametrize(
    ("pattern", "n_layers", "parts"),
    [
        ("TMZ", None, ["position 3", "'Z'", "T (transformer)", "M (mamba2)", "S (attention)"]),
        ("tm", None, ["position 1", "upper case", "'TM'"]),
        ("Tmambo", None, ["position 2", "'mambo'", "mamba1"]),
        ("T*0", None, ["position 3", "'*0'"]),
        ("T*", None, ["position 3", "count"]),
        ("T*-1", None, ["position 3"]),
        ("T*2*3", None, ["position 4", "'*'"]),
        ("T*1.5", None, ["whole numbers"]),
        ("*3", None, ["position 1", "'*'"]),
        ("T3", None, ["position 2", "T*3"]),
        ("M4", None, ["position 1", "M1, M2, M3", "M*4"]),
        ("(TM*6", None, ["position 1", "never closed"]),
        ("TM)*6", None, ["position 3", "without '('"]),
        ("((TM)*2)*3", None, ["position 2", "group inside a group"]),
        ("()*3", None, ["empty group"]),
        ("(TM):mlp", None, ["position 5", "':'", "on each letter"]),
        ("(TM)*50%", 4, ["share (%)", "in a group"]),
        ("T:mpl", None, ["position 3", "'mpl'", "none, mlp, moe"]),
        ("T:", None, ["position 2", "none, mlp, moe"]),
        ("T*60% M", 5, ["'M'", "shares"]),
        ("T*60% M*40%", None, ["n_layers"]),
        ("T*60% M*60%", 5, ["120%", "100%"]),
        ("T*0% M*100%", 5, ["position 3"]),
        ("T*1001", None, ["1,000 layers"]),
        ("(TM)*501", None, ["1,000 layers"]),
        ("T*" + "9" * 6000, None, ["1,000 layers"]),
        ("T*600 M*600", None, ["1,000 layers"]),
        ("T, M", None, ["position 2", "spaces"]),
        ("", None, ["no layers", "null"]),
        ([], None, ["no layers"]),
        (["T", "Q"], None, ["item 2", "'Q'"]),
        (["T", 1], None, ["expected text"]),
        (None, None, ["both null"]),
    ],
)
def test_mistakes_are_one_line_with_place_and_remedy(pattern, n_layers, parts):
    with pytest.raises(ConfigError) as caught:
        parse(pattern, n_layers, LETTERS)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert [part for part in parts if part not in message] == []


def test_notes():
    assert parse("TMM", 6, LETTERS)[1] is None
    assert "cut" in str(parse("TMM", 4, LETTERS)[1])
    assert "T*1%" in str(parse("T*1% M*99%", 4, LETTERS)[1])


near = st.lists(
    st.sampled_from([*"TMLSXQt()*:%,. 0123", "M1", "M3", ":mlp", ":moe", "*2", "*50%", "mamba", "(TM)*2", "\n"]),
    max_size=12,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=30), near, st.lists(near, max_size=4)), st.one_of(st.none(), st.integers(1, 1000)))
@example("T*" + "1" * 5000 + "%", 5)
@example("T*٣", None)
def test_any_text_parses_or_raises_a_config_error_and_what_parses_is_stable(pattern, n_layers):
    try:
        layers = parse(pattern, n_layers, LETTERS)[0]
    except ConfigError:
        return
    assert 1 <= len(layers) <= 1000
    assert n_layers is None or len(layers) == n_layers
    assert parse(spelled_out(layers), None, LETTERS)[0] == layers


SIGNS = [
    "T", "M", "M1", "M2", "M3", "L", "S", "X", "Q", "t", "transformer", "mamba", "mla", ":mlp", ":moe", ":none", ":",
    "*", "*2", "*0",
    "*-1", "*60%", "*40%", "%", "(", ")", "[", "]", ",", " ", "\n", "\0", "\x1b", "é", "☃", "\u0661", "*" + "9" * 30,
    "*999", "(" * 50,
    ")" * 50, "${x}",
]  # fmt: skip


def test_twenty_thousand_patterns_mean_layers_or_say_why():
    """At random, of the grammar's own signs and others; what has a meaning keeps it in the text that tables show."""
    began = time.perf_counter()
    meant = 0
    for number in range(20_000):
        generator = random.Random(number)
        pattern = "".join(generator.choice(SIGNS) for _ in range(generator.randint(0, 12)))
        n_layers = generator.choice([None, 1, 7, 1000])
        try:
            items = parse(pattern, n_layers, LETTERS)[0]
        except ConfigError as error:
            (problem,) = error.problems
            assert "\n" not in problem
            assert len(problem) < 1000
            continue
        meant += 1
        assert 1 <= len(items) <= 1000
        assert parse(spelled_out(items), None, LETTERS)[0] == items
    assert meant > 500
    assert time.perf_counter() - began < 60

"""The registries: what every kind of layer declares, and that the sections of the model follow from it."""

from __future__ import annotations

import sys
from dataclasses import fields
from subprocess import run

import pytest

from hybridlm.config.ffns import FFN_KINDS, FFNS
from hybridlm.config.kernels import PACKAGES, KernelsConfig
from hybridlm.config.mixers import MIXERS
from hybridlm.config.model import ModelConfig

KINDS = MIXERS | FFNS
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_letters_and_words_are_unique():
    letters, words = [m.letter for m in MIXERS.values()], [m.word or kind for kind, m in MIXERS.items()]
    assert len(set(letters)) == len(set(words)) == len(MIXERS)
    assert all(letter[0].isupper() and (len(letter) == 1 or letter[0] == "M") for letter in letters)
    assert "mamba" not in words, "M's own word"


@every_kind
def test_a_kind_has_its_section_its_letter_and_its_default_ffn(kind):
    assert type(getattr(ModelConfig(), kind)) is KINDS[kind]
    if kind in MIXERS:
        mixer = MIXERS[kind]
        assert mixer.ffn in FFN_KINDS
        assert getattr(ModelConfig().ffn_after, kind) == mixer.ffn
        for name in (mixer.letter, mixer.word or kind):
            (layer,) = ModelConfig(pattern=name).layers
            assert (layer.kind, layer.ffn_kind) == (kind, mixer.ffn)
        assert ModelConfig(pattern=mixer.letter).kinds == {kind, mixer.ffn}
        assert (kind in PACKAGES) == (mixer.kernel is not None) == (kind in KernelsConfig.model_fields)


@every_kind
def test_a_spec_names_its_layer_and_gets_narrower(kind):
    model = ModelConfig(d_model=1024)
    for form in ({}, *getattr(KINDS[kind], "forms", ())):
        spec = KINDS[kind].model_validate(form).resolve(model, f"model.{kind}")
        assert spec.layer.split(".")[0] == kind
        narrow = spec.narrowed(64)
        assert (type(narrow), narrow.d_model) == (type(spec), 64)
        for field in fields(spec):
            before, after = getattr(spec, field.name), getattr(narrow, field.name)
            assert after == before or after < before, field.name
            if field.name in ("head_dim", "d_state", "chunk", "window"):
                assert after == before, field.name
        assert hash(spec) != hash(narrow)


@every_kind
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_widened_section_is_legal(kind, factor):
    model = ModelConfig(d_model=256)
    section = KINDS[kind]()
    wider = section.widened(model, factor, 8)
    assert type(wider) is type(section)
    wider.resolve(model, "")
    if wider != section:
        widths = ("d_ff", "d_expert", "n_heads", "n_v_heads", "d_inner")
        before, after = section.resolve(model, ""), wider.resolve(model, "")
        name = next(name for name in widths if hasattr(before, name))
        assert getattr(after, name) == pytest.approx(factor * getattr(before, name), rel=0.05)


def test_the_sections_come_in_the_order_of_the_registries():
    names = list(ModelConfig.model_fields)
    assert names[names.index("ffn_after") + 1 : names.index("init")] == list(KINDS)
    assert list(type(ModelConfig().ffn_after).model_fields) == list(MIXERS)


def test_no_torch_is_imported():
    code = "import sys; import hybridlm.config.load; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

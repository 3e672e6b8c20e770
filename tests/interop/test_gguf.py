"""GGUF files: what is in them, read by the package gguf; what is refused; how text is cut. llama.cpp itself:
test_llama_cpp.py."""

from __future__ import annotations

import json

import pytest
import torch
from llama_cpp_models import ATTENTION, LATENT, MAMBA, MODELS, ROTARY, SIGMOID, section_of
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers
from untrained import untrained_run

from hybridlm.cli.verbs import run_app
from hybridlm.config.data import DataConfig, TokenizerConfig
from hybridlm.config.load import validate_model
from hybridlm.data.chat import template_of
from hybridlm.data.preparing.prepare import held_out_text, prepare
from hybridlm.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from hybridlm.data.tokenizer.cuts import SPLITS
from hybridlm.errors import RunFailed, UserError
from hybridlm.interop.gguf import export as gguf_export
from hybridlm.interop.gguf.architectures import TARGETS
from hybridlm.interop.gguf.export import export_gguf
from hybridlm.interop.gguf.tensors import links, paired
from hybridlm.interop.gguf.vocabulary import differing, vocabulary
from hybridlm.interop.links import exported
from hybridlm.model.build import build_model
from hybridlm.ops.rotary import apply_rotary
from hybridlm.runs.checkpoint import load_run

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
CHAT = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CODE = ["kind = f'type of {self}'\n        return f'reader'\n" * 40]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Without llama.cpp, whether it is installed or not."""
    real = gguf_export.importlib.util.find_spec
    monkeypatch.setattr(
        gguf_export.importlib.util, "find_spec", lambda name, *rest: None if name == "llama_cpp" else real(name, *rest)
    )


def loaded(path):
    return load_run(str(path), torch.device("cpu"))


def read(path):
    """The keys and the tensors of a file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("case", MODELS)
def test_every_tensor_and_key_is_in_the_file(case, tmp_path):
    run = loaded(untrained_run(tmp_path / "run", section_of(case), every=True))
    done = export_gguf(run, tmp_path / "model.gguf")
    keys, tensors = read(tmp_path / "model.gguf")
    arch = keys["general.architecture"]
    assert arch == case.split(",")[0] + ("_moe" if case == "nemotron_h, experts" else "")
    assert done.name == f"{arch}, f32"
    assert {f"blk.{i}" for i in range(keys[f"{arch}.block_count"])} | {"token_embd", "output_norm"} <= {
        ".".join(name.split(".")[: 2 if name.startswith("blk") else 1]) for name in tensors
    }
    assert ("output.weight" in tensors) != run.model.config.tie_embeddings
    assert tensors["token_embd.weight"].data.shape == (258, 32)
    changed = {"kv_b_proj", "gate_up_proj"}  # two tensors there
    ours = sum(1 + any(part in name for part in changed) for name in run.model.state_dict())
    assert len(tensors) == ours
    lists = [value for key, value in keys.items() if isinstance(value, list) and key.startswith(arch)]
    assert all(len(value) == keys[f"{arch}.block_count"] for value in lists)


def test_channels_that_are_rotated_in_halves_are_reordered_to_neighbours():
    weight, x = torch.randn(3 * 10, 6), torch.randn(1, 4, 6)
    angles = torch.randn(1, 4, 2)
    cos, sin = angles.cos(), angles.sin()
    for first in (0, 6):
        halves, neighbours = ((x @ rows.T).unflatten(-1, (3, 10)) for rows in (weight, paired(weight, 3, first, 4)))
        turned = [
            apply_rotary(part[..., first : first + 4], cos, sin, interleaved=interleaved)
            for part, interleaved in ((halves, False), (neighbours, True))
        ]
        assert torch.allclose(*turned, atol=1e-6)  # both come out in halves
        others = [i for i in range(10) if not first <= i < first + 4]
        assert torch.equal(halves[..., others], neighbours[..., others])


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_rounding_keeps_small_tensors_and_says_what_it_could_not_round(dtype, tmp_path):
    run = loaded(untrained_run(tmp_path / "run", section_of("deepseek2"), every=True))
    done = export_gguf(run, tmp_path / "model.gguf", dtype=dtype)
    _, tensors = read(tmp_path / "model.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == dtype.upper()
    assert {kinds[name] for name in ("output_norm.weight", "blk.1.exp_probs_b.bias", "blk.1.ffn_gate_inp.weight")} == {
        "F32"
    }
    assert kinds["blk.1.ffn_down_exps.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())
    assert any("blk.0.attn_q_b.weight" in note for note in done.notes) == (dtype == "q8_0")


def test_a_damaged_file_does_not_get_its_name(tmp_path, monkeypatch, capsys):
    run = untrained_run(tmp_path / "run", section_of("llama"))
    monkeypatch.setattr(gguf, "quantize", lambda data, kind: data * 1.001)
    with pytest.raises(RunFailed, match="token_embd"):
        export_gguf(loaded(run), tmp_path / "out" / "x.gguf")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.gguf").write_text("mine")
    for arguments in (["mine.gguf"], ["new.gguf", "--arch", "gpt2"], ["new.gguf", "--arch", "mamba"]):
        with pytest.raises(SystemExit) as end:
            run_app(["export", str(run), str(tmp_path / arguments[0]), "--to", "gguf", *arguments[1:]])
        assert end.value.code == 2
    assert (tmp_path / "mine.gguf").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.gguf", "run"]


WRONG = {
    "llama": {"logit_softcap": 15.0, "attention": ROTARY | {"gate": True}},
    "qwen3": {"pattern": "ST", "variants": {"S": {"mixer": "attention", "window": 5}}},
    "arcee": {"logit_scale": 2.0},
    "mamba": {"mamba1": {"expand": 3, "bias": True}},
    "mamba2": {"mamba2": MAMBA | {"norm_before_gate": True}},
    "granitehybrid": {"pattern": "M2 T:mlp M2:none", "mamba2": MAMBA | {"expand": 1}},
    "granitehybrid, experts": {"pattern": "M2:moe T:none"},
    "nemotron_h": {"pattern": "M2:moe T:mlp", "moe": SIGMOID | {"activation": "relu2"}},
    "deepseek2": {"pattern": "L*26", "norm_eps": 1e-5, "mla": LATENT | {"q_lora_rank": 24}},
}


@pytest.mark.parametrize("case", WRONG)
def test_following_the_advice_makes_a_file_possible(case):
    section, target = section_of(case) | WRONG[case], next(one for one in TARGETS if one.name == case.split(",")[0])
    assert list(target.needs(validate_model(section)))
    for _ in range(3):
        for need in target.needs(validate_model(section)):
            assert need.overrides, need
            assert "ForCausalLM" not in need.line()
            for override in need.overrides:
                follow(section, override)
    model = build_model(validate_model(section), 90).to_empty(device="cpu")
    assert exported(links(model.config, target), model.state_dict())
    assert not list(target.needs(model.config))


def follow(section, override):
    path, value = override.removeprefix("model.").split("=", 1)
    *sections, field = path.split(".")
    for name in sections:
        section[name] = dict(section.get(name, {}))
        section = section[name]
    section[field] = value.strip("'") if field == "pattern" or value[0].isalpha() else json.loads(value)
    section[field] = {"null": None, "true": True, "false": False}.get(value, section[field])


def test_what_no_override_changes_is_said():
    model = validate_model({"d_model": 32, "pattern": "M3 T", "attention": ATTENTION})
    assert all(any(not need.overrides for need in target.needs(model)) for target in TARGETS)


def test_the_vocabulary_is_the_tokenizers(tmp_path):
    tokenizer = train_bpe(CODE, 330, CHAT)
    found = vocabulary(tokenizer, 340, chat=True).keys
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[:5] == ["<|endoftext|>", *CHAT]
    assert set(types[:5]) == {3}
    assert set(types[5 : tokenizer.vocab_size]) == {1}
    assert set(types[tokenizer.vocab_size :]) == {5}
    assert len(set(tokens)) == 340
    assert len(found["tokenizer.ggml.merges"]) == tokenizer.vocab_size - 256 - 5
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert found["tokenizer.ggml.eot_token_id"] == tokenizer.special_id("<|end|>")
    assert found["tokenizer.chat_template"] == template_of(tokenizer).jinja()
    assert "tokenizer.chat_template" not in vocabulary(tokenizer, 340, chat=False).keys


def with_cuts(*steps):
    """Our tokens, with text cut by other steps."""
    facts = train_bpe(CODE, 300).facts()
    sequence = pre_tokenizers.Sequence(list(steps))
    library = LibraryTokenizer.from_str(json.dumps(facts))
    library.pre_tokenizer = sequence
    return Tokenizer(library)


def test_llama_cpps_name_of_the_cuts():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    by = {"llama-bpe": SPLITS["llama3"], "qwen2": SPLITS["llama3"].replace("{1,3}", "")}
    from tokenizers import Regex

    for name, pattern in by.items():
        found = vocabulary(with_cuts(pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level), 300, chat=False)
        assert (found.keys["tokenizer.ggml.pre"], found.exact) == (name, True)
    gpt2 = with_cuts(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    assert vocabulary(gpt2, 300, chat=False).keys["tokenizer.ggml.pre"] == "gpt-2"
    others = (
        train_bpe(CODE, 300),
        with_cuts(pre_tokenizers.Split(Regex(SPLITS["llama3"]), "merged_with_previous"), byte_level),
        with_cuts(pre_tokenizers.Digits(), byte_level),
    )
    for other in others:
        found = vocabulary(other, 300, chat=False)
        assert (found.keys["tokenizer.ggml.pre"], found.exact) == ("llama-bpe", False)
    assert vocabulary(train_bpe(CODE, 300, split="llama3"), 300, chat=False).exact
    assert vocabulary(byte_tokenizer(), 257, chat=False).exact  # nothing to merge


def test_a_tokenizer_of_another_kind_is_refused():
    vocab = {letter: i for i, letter in enumerate(["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a"])}
    library = LibraryTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    library.add_special_tokens(["<|endoftext|>"])
    from tokenizers import decoders

    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
    with pytest.raises(UserError, match="byte-level"):
        vocabulary(Tokenizer(library), 300, chat=False)


def test_tokens_that_llama_cpp_does_not_cut_are_counted():
    different, total = differing(train_bpe(CODE, 330), CODE)
    assert 0 < different < total
    assert differing(train_bpe(CODE, 330, split="llama3"), CODE)[0] == 0
    assert differing(train_bpe(CODE, 330), ["some words\n"]) == (0, len(train_bpe(CODE, 330).encode("some words\n")))


def test_they_are_counted_in_the_runs_own_text_where_it_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDLM_CACHE", str(tmp_path / "cache"))
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(CODE[0] + str(i))
    data = DataConfig(source="files", path=f"{tmp_path}/*.txt", tokenizer=TokenizerConfig(vocab_size=330))
    tokenizer = prepare(data).tokenizer
    assert "".join(held_out_text(data, tokenizer, 10**6)).startswith(CODE[0])
    assert held_out_text(data, byte_tokenizer(), 10**6) == []
    run = untrained_run(tmp_path / "run", section_of("llama"), tokenizer)
    note = export_gguf(loaded(run), tmp_path / "a.gguf").notes[0]
    assert "validation" in note
    other = untrained_run(tmp_path / "other", section_of("llama"), train_bpe(["other words\n" * 9], 300))
    assert "Python" in export_gguf(loaded(other), tmp_path / "b.gguf").notes[0]

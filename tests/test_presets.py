"""The presets are what their families' descriptions say, say what they are, and go with every card."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from hybridlm.cli.compose import compose_config
from hybridlm.config.constraints import constraint_problems
from hybridlm.config.groups import groups
from hybridlm.config.hardware import HardwareConfig
from hybridlm.model.build import build_model
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run

ROOT = Path(__file__).resolve().parent.parent
MODELS = groups()["model"]


def load_script():
    spec = importlib.util.spec_from_file_location("presets_page", ROOT / "docs/presets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = load_script()


@pytest.fixture(scope="module")
def configs():
    return {name: compose_config([f"model={name}"]) for name in MODELS}


def first_comment(name):
    lines = (ROOT / f"conf/model/{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines[1:] if lines[0].startswith("# @package") else lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_says_what_size_does_to_it(name, configs):
    sentences = re.split(r"(?<=\.) ", first_comment(name))
    about = [sentence for sentence in sentences if "`size`" in sentence]
    assert len(sentences) >= 2
    assert len(about) == 1, sentences
    own = configs[name].model.sizes == ("default", "tiny")
    assert ("default and tiny only" in about[0]) == own
    assert ("d12 to d26" in about[0]) == (not own)


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_whose_vocabulary_dwarfs_it_says_so(name, configs):
    said = "More than 40% of its parameters are the embedding" in first_comment(name)
    assert said == (
        PAGE.share_of_vocabulary(build_model(configs[name].model, PAGE.vocabulary(configs[name]))) > PAGE.DWARFED
    )


@pytest.mark.parametrize(
    "sizes", [("default",), pytest.param(PAGE.SIZES, marks=pytest.mark.slow)], ids=["default", "all"]
)
def test_the_table_of_the_page_is_current(sizes, configs):
    text = (ROOT / "docs/presets.md").read_text(encoding="utf-8")
    rows = PAGE.MARKS.search(text)[0].splitlines()[3:-1]
    expected = [PAGE.row(name, size) for name in MODELS for size in sizes if size in configs[name].model.sizes]
    assert [line for line in rows if line.split("`")[3] in sizes] == [line.rstrip("\n") for line in expected]


def test_every_preset_goes_with_every_card(configs):
    """A profile's file touches its own section only, so each is composed once and put beside each preset."""
    cards = {card: compose_config([f"hardware={card}", "model=transformer"]) for card in groups()["hardware"]}
    base = compose_config(["model=transformer"])
    for card, composed in cards.items():
        assert composed.model_copy(update={"hardware": base.hardware}) == base, card
        assert isinstance(composed.hardware, HardwareConfig)
        for name, config in configs.items():
            assert constraint_problems(config.model_copy(update={"hardware": composed.hardware})) == [], (name, card)


def test_a_card_on_the_command_line_goes_with_a_preset_of_two_sections():
    config = compose_config(["model=slm_100m", "hardware=rtx3070"])
    assert (config.hardware.name, config.data.seq_len, config.data.tokenizer.vocab_size) == ("rtx3070", 1024, 32_768)
    assert config.trainer.checkpoint_blocks == 1
    assert compose_config(["model=slm_100m", "data=tinystories", "data.seq_len=512"]).data.seq_len == 512


def kinds(config):
    return "".join(
        {"attention": "T", "mla": "L", "mamba1": "1", "mamba2": "2", "mamba3": "3", "gdn": "G", "kda": "K"}[x.kind]
        for x in config.model.layers
    )


def test_the_hybrids_have_their_layers():
    def at(name, size):
        return compose_config([f"model={name}", f"size={size}"])

    assert kinds(at("hybrid_early_t_late_m", "d20")) == "T" * 12 + "2" * 8
    assert kinds(at("hybrid_strategic", "default")) == "TT222222T222222TMTT".replace("M", "2")
    assert at("hybrid_strategic", "default").model.layer_note is None
    assert kinds(at("hybrid_strategic", "d16")) == "TT222222T222222T"
    assert kinds(at("hybrid_strategic", "d20")) == "TT222222T222222T2TTT"
    assert "cut its cycle of 19" in at("hybrid_strategic", "d20").model.layer_note
    assert kinds(at("hybrid_gdn", "d12")) == "GGGT" * 3
    assert kinds(at("kimi", "d12")) == "KKKL" * 3
    assert kinds(at("gated_deltanet", "d12")) == "G" * 12


def test_the_delta_hybrids_have_what_their_origins_export(configs):
    gdn, kimi = configs["hybrid_gdn"].model, configs["kimi"].model
    assert gdn.norm_eps == kimi.norm_eps == 1e-6
    for layer in (*gdn.layers, *kimi.layers):
        assert layer.ffn.activation == "swiglu"
        if layer.kind in ("gdn", "kda"):
            assert not layer.params.allow_neg_eigval
            assert layer.params.head_k_dim == layer.params.head_v_dim == 64
    assert all(layer.params.qk_norm for layer in gdn.layers if layer.kind == "attention")
    assert not any(layer.params.rope for layer in kimi.layers if layer.kind == "mla")
    assert {layer.ffn_kind for layer in kimi.layers} == {"moe"}


@pytest.mark.parametrize(
    "name",
    [name for name in MODELS if not name.startswith(("hybrid_small", "hybrid_gdn", "kimi", "slm_", "nano"))],
)
def test_architectures_have_the_blocks_of_their_family(name, configs):
    model = configs[name].model
    assert (model.tie_embeddings, model.logit_softcap) == (False, 15)
    for layer in model.layers:
        if layer.kind == "attention":
            assert layer.params.rope
            assert layer.params.qk_norm
        if layer.kind == "mla":
            assert layer.params.rope
        if layer.ffn is not None:
            assert layer.ffn.activation == "relu2"
        if layer.kind == "mamba1":
            assert (layer.params.d_state, layer.params.d_conv, layer.params.d_inner, layer.ffn) == (
                16,
                4,
                2 * model.d_model,
                None,
            )
        if layer.kind == "mamba3":
            assert layer.params.mimo_rank == (4 if name == "mamba3_mimo" else None)


def test_slm_presets_have_the_numbers_of_their_origin(configs):
    for name, width, layers in (
        ("slm_50m", 384, "111 1TT"),
        ("slm_100m", 512, "11111TTT"),
        ("slm_200m", 768, "11111111TTTT"),
    ):
        config = configs[name]
        assert (config.model.d_model, kinds(config)) == (width, layers.replace(" ", ""))
        assert (config.data.tokenizer.vocab_size, config.data.seq_len) == (32_768, 1024)
        assert (config.trainer.precision, config.trainer.checkpoint_blocks) == ("auto", 1)
        assert {layer.params.head_dim for layer in config.model.layers if layer.kind == "attention"} == {64}


def test_nano_presets_have_the_numbers_of_their_origin(configs):
    start = configs["nano_start"]
    assert (start.model.d_model, kinds(start), start.model.attention.n_heads, start.model.vocab_size) == (
        256,
        "TTTTTT",
        8,
        100_315,
    )
    layers = {"nano": "222L222L", "nano_mamba3_hybrid": "333L333L", "nano_mamba2": "222L222L", "nano_mamba3": "3" * 8}
    for name, expected in {**layers, "nano_mamba3_mimo": "3" * 8}.items():
        config = configs[name]
        assert (config.model.d_model, config.model.vocab_size, config.data.seq_len, kinds(config)) == (
            384,
            128_354,
            512,
            expected,
        )
        for layer in config.model.layers:
            spec = layer.params
            if layer.kind == "mla":
                assert (spec.n_heads, spec.kv_lora_rank, spec.q_lora_rank, spec.rope_theta) == (6, 192, 192, 10_000)
                assert (spec.qk_rope_head_dim, spec.qk_nope_head_dim, spec.v_head_dim) == (16, 48, 64)
                assert layer.ffn_kind == ("mlp" if name == "nano_mamba2" else "moe")
                if layer.ffn_kind == "moe":
                    moe = layer.ffn
                    assert (moe.n_experts, moe.top_k, moe.d_shared, moe.d_expert, moe.balance_loss_weight) == (
                        4,
                        2,
                        1536,
                        1536,
                        0.01,
                    )
                continue
            assert (spec.n_heads, spec.head_dim, spec.d_state, spec.n_groups, spec.d_conv, layer.ffn) == (
                48,
                16,
                64,
                1,
                4,
                None,
            )
            if layer.kind == "mamba2":
                assert spec.chunk == 64
            else:
                assert spec.use_conv == (name == "nano_mamba3_hybrid")
                assert spec.mimo_rank == (4 if name == "nano_mamba3_mimo" else None)


def test_the_jobs_of_the_small_card():
    for name, memory, seq_len, batch in (("rtx3070_d16", 8, 512, 2), ("rtx3070_d16_12gb", 12, 1024, 4)):
        config = compose_config([f"experiments={name}"])
        assert (config.hardware.name, config.hardware.memory_gb, config.size.name) == ("rtx3070", memory, "d16")
        assert (config.data.seq_len, config.data.batch_size, config.data.tokenizer.vocab_size) == (
            seq_len,
            batch,
            65_536,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_preset_trains_two_steps_at_the_test_size(name, corpus, tmp_path):
    overrides = [
        f"model={name}",
        "size=tiny",
        "data=files",
        f"data.path={corpus}/*.txt",
        f"data.out={tmp_path}/data",
        "hardware=cpu",
    ]
    config = compose_config([*overrides, "trainer.max_steps=2", "trainer.log_every=1", "callbacks=none"])
    summary = run(config, RunFolder(tmp_path / "run"), None)
    assert (summary["model"], summary["steps"]) == (name, 2)
    assert 1 < summary["val/loss"] < 7  # ln 512 is 6.2


@pytest.mark.slow
@pytest.mark.parametrize("name", groups()["experiments"])
def test_an_experiment_trains_two_steps(name, corpus, tmp_path):
    """With its own models, but those meant for a card at the test size; with its own task, or else a small text."""
    overrides = [f"experiments={name}", "trainer.max_steps=2", "trainer.log_every=1", "callbacks=none", "hardware=cpu"]
    if compose_config([f"experiments={name}"]).data.source == "synthetic":
        overrides += ["data.synthetic.val_examples=16", "data.global_batch=2"]
    else:
        overrides += ["data=files", f"data.path={corpus}/*.txt", f"data.out={tmp_path}/data"]
    if name.startswith("rtx"):
        overrides += ["size=tiny"]
    summary = run(compose_config(overrides), RunFolder(tmp_path / "run"), None)
    assert summary["steps"] == 2
    assert 0.5 < summary["val/loss"] < 8  # ln 2048 is 7.6, ln 2 of parity 0.69

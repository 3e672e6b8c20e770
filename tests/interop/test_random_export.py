"""Random models: each is exported and checked, or refused with constraints that are true: whoever follows them gets a
model that is exported and checked."""

from __future__ import annotations

import random
import shlex
from contextlib import suppress

import pytest
import torch
from torch import nn

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import to_yaml, validate_model
from hybridlm.config.run import RunConfig
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import ConfigError
from hybridlm.interop import verify
from hybridlm.interop.architectures import ARCHITECTURES
from hybridlm.interop.export import export_hf, weights_of
from hybridlm.interop.foreign import read_config, read_tensors
from hybridlm.interop.links import imported
from hybridlm.interop.reach import nearest
from hybridlm.interop.reference import judged
from hybridlm.model.build import build_model
from hybridlm.runs.checkpoint import LoadedRun
from hybridlm.runs.run_folder import RunFolder

pytest.importorskip("transformers", reason="transformers is not installed")
FAST = 6
TOGETHER = ({"attention", "mamba2"}, {"attention", "gdn"}, {"kda", "mla"}, {"mamba1"})  # kinds that one holds
FAMILIES = (  # letters that some architecture holds together, and all of them
    *(
        "T",
        "TS",
        "M1",
        "M1 S",
        "M2",
        "M2 S",
        "M2 T",
        "M2 T S",
        "G T",
        "G T S",
        "G",
        "K L",
        "K L S",
        "K",
        "L",
        "L S",
        "T L",
        "M2 L",
        "M3 T",
    ),
    "T M1 M2 M3 L G K S",
)
FIELDS = {
    "": {
        "d_model": (32, 48, 40),
        "norm_eps": (1e-5, 1e-6, 1e-3),
        "tie_embeddings": (True, False),
        "vocab_multiple": (1, 8, 64),
        "vocab_size": (None, 300),
        "embedding_scale": (1.0, 4.0),
        "residual_scale": (1.0, 0.3),
        "logit_scale": (1.0, 0.3),
        "logit_softcap": (None, 15.0),
    },
    "attention": {
        "n_heads": (2, 1, 4, 8, 3),
        "n_kv_heads": (None, 1, 2),
        "head_dim": (None, 8, 24),
        "rope": (True, False, None),
        "rope_theta": (10_000.0, 500.0),
        "rope_fraction": (1.0, 0.5, 0.25),
        "qk_norm": (True, False, None),
        "window": (None, 3, 40),
        "scale": (None, 0.2),
        "gate": (False, True),
    },
    "mamba1": {
        "d_state": (16, 1, 4),
        "d_conv": (4, 1, 2),
        "expand": (2, 1, 1.5),
        "dt_rank": (None, 1, 5),
        "bias": (False, True),
        "chunk": (16, 3),
    },
    "mamba2": {
        "d_state": (8, 16),
        "d_conv": (4, 1, 2),
        "expand": (2, 1, 1.5, 0.5),
        "head_dim": (8, 16),
        "n_groups": (1, 2),
        "chunk": (64, 5),
        "dt_limit": ((0.0, float("inf")), (0.01, 0.1)),
        "norm_before_gate": (False, True),
    },
    "mamba3": {"d_state": (8, 16), "head_dim": (8, 16), "expand": (2,), "mimo_rank": (0, 2)},
    "mla": {
        "n_heads": (2, 1),
        "kv_lora_rank": (None, 8),
        "q_lora_rank": (None, 8),
        "qk_nope_head_dim": (8, 12),
        "qk_rope_head_dim": (8, 4, 0),
        "v_head_dim": (8, 6),
        "rope": (True, False),
        "rope_theta": (10_000.0, 500.0),
        "rope_interleave": (True, False),
        "scale": (None, 0.2),
    },
    "gdn": {
        "head_k_dim": (8, 4),
        "head_v_dim": (None, 16),
        "n_k_heads": (None, 1),
        "n_v_heads": (None, 2),
        "use_conv": (True, False),
        "d_conv": (4, 1, 2),
        "allow_neg_eigval": (False, True),
        "chunk": (32, 4),
        "use_gate": (True, False),
    },
    "kda": {
        "head_k_dim": (8, 4),
        "head_v_dim": (None, 16),
        "n_k_heads": (None, 1),
        "use_conv": (True, False),
        "d_conv": (4, 1, 2),
        "allow_neg_eigval": (False, True),
        "gate_bias": (False, True),
        "lower_bound": (None, -4.0),
    },
    "mlp": {"d_ff": (None, 24, 33), "activation": ("swiglu", "relu2")},
    "moe": {
        "n_experts": (4, 1, 6),
        "top_k": (2, 1),
        "d_expert": (None, 12),
        "n_shared_experts": (0, 1, 2),
        "d_shared": (None, 20),
        "shared_gate": (False, True),
        "activation": ("swiglu", "relu2"),
        "router": ("softmax", "sigmoid"),
        "norm_topk_prob": (True, False),
        "routed_scaling_factor": (1.0, 2.5),
        "n_expert_groups": (1, 2),
        "topk_groups": (1, 2),
    },
}
KINDS = {"T": "attention", "M1": "mamba1", "M2": "mamba2", "M3": "mamba3", "L": "mla", "G": "gdn", "K": "kda"}


def random_model(seed: int):
    """A valid model section: letters of a family, each field at its first value or, less often, at another."""
    chance = random.Random(seed)

    def fields(kind):
        odds = chance.choice((0.1, 0.3, 0.6))
        return {name: chance.choice(some) if chance.random() < odds else some[0] for name, some in FIELDS[kind].items()}

    while True:
        letters = chance.choice(FAMILIES)
        letters = letters.split() if " " in letters or letters[0] in "MGKL" else list(letters)
        ffns = chance.choice((["mlp"], ["none"], ["moe"], ["none", "mlp"], ["mlp", "moe"], ["none", "mlp", "moe"]))
        section = fields("") | {kind: fields(kind) for kind in FIELDS if kind}
        section["pattern"] = [
            f"{chance.choice(letters)}:{chance.choice(ffns)}" for _ in range(chance.choice((1, 2, 3, 4)))
        ]
        kind = chance.choice([KINDS[letter] for letter in letters if letter != "S"] or ["attention"])
        names = chance.sample(list(FIELDS[kind]), chance.choice((1, 1, 3)))
        section["variants"] = {"S": {"mixer": kind} | {name: chance.choice(FIELDS[kind][name]) for name in names}}
        try:
            model = validate_model(section)
            model.layers
        except ConfigError:
            continue
        return model


def run_of(section, folder):
    """A run of weights that all matter."""
    tokenizer = byte_tokenizer()
    model = build_model(section, tokenizer.vocab_size).to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or name.endswith("mixer.D"):
                nn.init.uniform_(tensor, 0.5, 1.5)
            elif name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.config.write_text(to_yaml(RunConfig(model=section)))
    return LoadedRun(model.eval(), tokenizer, run, folder / "weights.safetensors", 0)


def check_here(folder, reference, name):
    return judged(verify.compare(str(folder), str(reference)), name)


def follow(config, needs):
    """The configuration with every override that the refusal names, as a shell and the command line read them."""
    return compose_config([word for need in needs for word in shlex.split(" ".join(need.overrides))], base=config)


def export_here(model, folder, name=None):
    run = run_of(model, folder / "run")
    export_hf(run, folder / "exported", arch=name)
    return run.model


def comes_back(model, folder):
    found = read_config(folder)
    back, expected = imported(found.architecture.links(found.section), read_tensors(folder), "here"), weights_of(model)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    again = build_model(found.section, found.vocab)
    again.load_state_dict(back, assign=True)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():  # lengths of chunks, which change the order of sums, do not travel
        assert again.eval()(ids).logits.sub(model(ids).logits).abs().max() < 1e-4


def really_hopeless(config, architecture, needs):
    """Whether what no override lifts is true: no architecture holds these kinds of layers together, or following the
    other constraints breaks a rule of our own configuration."""
    hopeless = next(need for need in needs if not need.overrides)
    if hopeless.field.startswith("layer "):
        return not any({layer.kind for layer in config.model.layers} <= held for held in TOGETHER)
    with pytest.raises(ConfigError) as refused:
        follow(config, [need for need in needs if need.overrides])
    return hopeless.line() in refused.value.problems


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr("hybridlm.interop.export.check", check_here)


SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= FAST else []) for seed in range(60)]


@pytest.mark.parametrize("seed", SEEDS)
def test_exported_or_refused_with_the_way_out(seed, tmp_path):
    config = RunConfig(model=random_model(seed))
    for _ in range(4):
        architecture, needs = nearest(config.model, ARCHITECTURES)
        if not needs:
            comes_back(export_here(config.model, tmp_path), tmp_path / "exported")
            return
        if not all(need.overrides for need in needs):
            assert really_hopeless(config, architecture, needs)
            return
        config = follow(config, needs)
    pytest.fail(f"the advice does not end: {[need.line() for need in needs]}")


@pytest.mark.parametrize("seed", SEEDS)
def test_each_constraint_stands_in_the_way_alone(seed, tmp_path, monkeypatch):
    """Everything else followed, the model is exported as something else, or not at all."""
    config = RunConfig(model=random_model(seed))
    architecture, needs = nearest(config.model, ARCHITECTURES)
    if not all(need.overrides for need in needs):
        return
    left = {}
    for need in needs:
        fields = {override.partition("=")[0] for override in need.overrides}
        others = [one for one in needs if not fields & {override.partition("=")[0] for override in one.overrides}]
        with suppress(ConfigError):  # one may need another
            model = follow(config, others).model
            if need.field in {one.field for one in architecture.needs(model)}:  # not only as a consequence
                left[need.field] = model
    monkeypatch.setattr(type(architecture), "needs", lambda self, model: iter(()))
    for number, (field, model) in enumerate(left.items()):
        if field != "model.moe.norm_topk_prob" or model.moe.n_experts > 1:
            with pytest.raises(Exception):  # noqa: PT011, it is transformers that fails
                export_here(model, tmp_path / str(number), architecture.name)

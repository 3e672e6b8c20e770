"""Checkpoints of mamba_ssm: sizes come from the tensors, and the model computes what transformers' classes, or the
recurrence written out, compute with the same tensors."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.interop.importing import import_folder
from hybridlm.interop.incoming import Told
from hybridlm.runs.checkpoint import load_run
from tests.recurrences_mamba import mamba3

IDS = 257  # of the tokenizer; the checkpoints have 260 rows
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(path)
    return path


@pytest.fixture
def bring(tokenizer, tmp_path):
    """Writes a checkpoint, imports it, and returns the loaded run."""

    def bring(tensors, config=None, *, pickled=True, **told):
        folder = tmp_path / "theirs"
        folder.mkdir()
        if pickled:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        import_folder(folder, tmp_path / "ours", Told(**{"tokenizer": tokenizer, **told}))
        return load_run(str(tmp_path / "ours"), CPU)

    return bring


def drawn(model, seed=0):
    """Random weights without a one or a zero among them, in the stable range of A."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.items() if isinstance(model, dict) else model.named_parameters():
            if name.endswith("A_log"):
                weight.copy_(torch.rand_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if "norm" in name or name.endswith("D") else 0.0))
    return model


def renamed(model):
    """The state dict of a Mamba of transformers as mamba_ssm saves it, the head under its own name on one storage."""
    tensors = {name.replace("embeddings", "embedding"): value for name, value in model.state_dict().items()}
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]}


def assert_same(run, logits, ids):
    with torch.no_grad():
        ours = run.model(ids).logits[..., :IDS]
    assert (ours - logits[..., :IDS]).abs().max() / logits.abs().max() < 1e-5


def test_mamba1(bring):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "conv_kernel": 3, "expand": 3}
    config = transformers.MambaConfig(vocab_size=260, time_step_rank=7, layer_norm_epsilon=1e-5, **sizes)
    model = drawn(transformers.MambaForCausalLM(config).eval())
    ids = torch.randint(0, IDS, (2, 19))
    lies = {"d_model": 999, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {"d_state": 16, "expand": 2}}
    run = bring(renamed(model), lies)
    spec = run.model.config.layers[0].params
    assert (spec.d_inner, spec.d_state, spec.d_conv, spec.dt_rank) == (72, 5, 3, 7)
    with torch.no_grad():
        assert_same(run, model(ids).logits, ids)


def two(transformers, groups):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 12, "num_heads": 4, "head_dim": 16, "expand": 2}
    more = {"layer_norm_epsilon": 1e-5, "chunk_size": 8, "tie_word_embeddings": True}
    config = transformers.Mamba2Config(vocab_size=260, n_groups=groups, **sizes, **more)
    return drawn(transformers.Mamba2ForCausalLM(config).eval())


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(bring, groups):
    model = two(pytest.importorskip("transformers"), groups)
    ids = torch.randint(0, IDS, (2, 21))
    tensors = {name: tensor.clone() for name, tensor in renamed(model).items()}
    run = bring(tensors, {"ssm_cfg": {"layer": "Mamba2", "ngroups": groups}}, pickled=False)
    assert run.model.config.layers[0].params.n_groups == groups
    with torch.no_grad():
        assert_same(run, model(ids).logits, ids)


@pytest.mark.parametrize(
    "ssm", [{"ngroups": 0}, {"ngroups": 3}, {"ngroups": "two"}, {"dt_limit": 3}, {"norm_before_gate": 7}]
)
def test_what_shapes_do_not_tell_is_checked(bring, ssm):
    tensors = renamed(two(pytest.importorskip("transformers"), 2))
    with pytest.raises(UserError) as refused:
        bring(tensors, {"ssm_cfg": ssm})
    assert len(refused.value.problems) == 1


def three(rank, angles, groups, *, norm=False, mlp=False):
    """Tensors of a stack of two Mamba-3 layers: 24 wide, 4 heads of 12 channels, 16 states."""
    d_model, heads, width, states, mimo = 24, 4, 12, 16, rank or 1
    inner = heads * width
    tensors = {"backbone.embedding.weight": torch.empty(260, d_model), "backbone.norm_f.weight": torch.empty(d_model)}
    tensors["lm_head.weight"] = torch.empty(260, d_model)
    for i in range(2):
        at = f"backbone.layers.{i}."
        tensors[f"{at}norm.weight"] = torch.empty(d_model)
        shapes = {
            "in_proj.weight": (2 * inner + 2 * mimo * groups * states + 3 * heads + angles, d_model),
            **{"dt_bias": (heads,), "D": (heads,), "out_proj.weight": (d_model, inner)},
            **{f"{x}_bias": (heads, mimo, states) for x in "BC"},
            **{f"{x}_norm.weight": (states,) for x in "BC"},
            **({f"mimo_{x}": (heads, mimo, width) for x in "xzo"} if rank else {}),
            **({"norm.weight": (inner,)} if norm else {}),
        }
        tensors |= {f"{at}mixer.{name}": torch.empty(shape) for name, shape in shapes.items()}
        if mlp:
            tensors |= {f"{at}norm2.weight": torch.empty(d_model), f"{at}mlp.fc1.weight": torch.empty(80, d_model)}
            tensors |= {f"{at}mlp.fc2.weight": torch.empty(d_model, 40)}
    return drawn(tensors)


def computed(tensors, ids, spec):
    """The logits of a stack of Mamba-3 layers: add, norm, mix, and the gated MLP whose second half is the gate."""
    p = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], p[name], 1e-5)

    x = p["backbone.embedding.weight"][ids]
    for i in range(2):
        at = f"backbone.layers.{i}."
        mixer = {name.removeprefix(f"{at}mixer."): value for name, value in p.items() if name.startswith(f"{at}mixer.")}
        x = x + mamba3(mixer, norm(x, f"{at}norm.weight"), spec)[0]
        if f"{at}mlp.fc1.weight" in p:
            up, gate = (norm(x, f"{at}norm2.weight") @ p[f"{at}mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (up * F.silu(gate)) @ p[f"{at}mlp.fc2.weight"].T
    return (norm(x, "backbone.norm_f.weight") @ p["lm_head.weight"].T).float()


@pytest.mark.parametrize(
    ("rank", "angles", "groups", "more", "activation"),
    [
        (None, 4, 1, {}, "softplus"),
        (None, 8, 2, {"mlp": True}, "heavy_tail"),
        (2, 4, 1, {"norm": True}, "softplus"),
        (1, 8, 2, {}, "softplus"),
    ],
)
def test_mamba3(bring, rank, angles, groups, more, activation):
    tensors = three(rank, angles, groups, **more)
    run = bring(tensors, a_activation=activation)
    spec = run.model.config.layers[0].params
    assert (spec.mimo_rank, spec.n_angles, spec.n_groups, spec.head_dim) == (rank, angles, groups, 12)
    assert not run.model.config.tie_embeddings
    ids = torch.randint(0, IDS, (2, 13))
    assert_same(run, computed(tensors, ids, spec), ids)


@pytest.mark.parametrize(
    ("change", "config", "told", "part"),
    [
        ({}, {}, {"a_activation": None}, "--a-activation"),
        ({}, {}, {"tokenizer": None}, "--tokenizer"),
        ({}, {}, {"rope_theta": 10000.0}, "--rope-theta"),
        ({}, {"ssm_cfg": {"ngroups": 1, "surprise": 2}}, {}, "surprise"),
        ({}, [], {}, "JSON object"),
        ({"backbone.layers.1.mixer.D": None}, {}, {}, "layers.1.mixer.D"),
        ({"backbone.layers.1.mixer.B_bias": None}, {}, {}, "layers.1.mixer"),
        ({"backbone.layers.0.norm.bias": torch.ones(24)}, {}, {}, "norm.bias"),
        ({"backbone.layers.1.mixer.D": torch.ones(5)}, {}, {}, "mixer.D"),
        ({"backbone.layers.1.mixer.D": torch.full((4,), float("nan"))}, {}, {}, "not finite"),
        ({"backbone.layers.0.mixer.B_bias": torch.ones(0, 1, 16)}, {}, {}, ""),
        ({"backbone.embedding.weight": torch.ones(200, 24)}, {}, {}, "257 ids"),
        ({"backbone.embedding.weight": None}, {}, {}, "backbone.embedding.weight"),
        ({"step": 3}, {}, {}, "step"),
        ({"code": print}, {}, {}, "could run code"),
    ],
)
def test_what_has_no_counterpart_is_a_line(bring, tmp_path, change, config, told, part):
    tensors = {name: value for name, value in (three(None, 4, 1) | change).items() if value is not None}
    with pytest.raises(UserError) as refused:
        bring(tensors, config, **{"a_activation": "softplus", **told})
    (line,) = refused.value.problems
    assert part in line
    assert "\n" not in line
    assert not (tmp_path / "ours").exists()

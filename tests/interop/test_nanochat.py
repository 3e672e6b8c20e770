"""Checkpoints of nanochat: the plain generation comes in exactly, and later ones are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from hybridlm.cli.start import main
from hybridlm.cli.verbs import run_app
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.interop.importing import import_folder
from hybridlm.interop.incoming import Told
from hybridlm.runs.checkpoint import load_run
from hybridlm.runs.run_folder import RunFolder

IDS, WIDTH, HEADS, KV_HEADS, DEPTH = 257, 32, 4, 2, 2
CONFIG = {
    "sequence_len": 64,
    "vocab_size": 260,
    "n_layer": DEPTH,
    "n_head": HEADS,
    "n_kv_head": KV_HEADS,
    "n_embd": WIDTH,
}


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.4


def checkpoint():
    """Its embedding in bf16, as it is trained, and the names as torch.compile leaves them."""
    narrow = KV_HEADS * WIDTH // HEADS
    shapes = {"transformer.wte.weight": (260, WIDTH), "lm_head.weight": (260, WIDTH)}
    for i in range(DEPTH):
        at = f"transformer.h.{i}."
        shapes |= {f"{at}attn.c_{x}.weight": (rows, WIDTH) for x, rows in (("q", WIDTH), ("k", narrow), ("v", narrow))}
        shapes |= {f"{at}attn.c_proj.weight": (WIDTH, WIDTH), f"{at}mlp.c_fc.weight": (4 * WIDTH, WIDTH)}
        shapes |= {f"{at}mlp.c_proj.weight": (WIDTH, 4 * WIDTH)}
    tensors = {f"_orig_mod.{name}": drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return tensors | {"_orig_mod.transformer.wte.weight": tensors["_orig_mod.transformer.wte.weight"].bfloat16()}


def computed(tensors, ids, theta):
    """The logits of nanochat's plain generation, in float64."""
    p = {name.removeprefix("_orig_mod."): tensor.double() for name, tensor in tensors.items()}
    half = WIDTH // HEADS // 2
    turns = torch.arange(ids.shape[1]).double()[:, None] / theta ** (torch.arange(half).double() / half)
    cos, sin = turns.cos(), turns.sin()

    def norm(x):
        return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)

    def heads(x, name):
        return (x @ p[name].T).unflatten(-1, (-1, 2 * half)).transpose(1, 2)

    def turned(x):
        first, second = x.chunk(2, -1)
        return norm(torch.cat([first * cos + second * sin, second * cos - first * sin], -1))

    x = norm(p["transformer.wte.weight"][ids])
    for i in range(DEPTH):
        at = f"transformer.h.{i}."
        q, k, v = (heads(norm(x), f"{at}attn.c_{name}.weight") for name in "qkv")
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + y.transpose(1, 2).flatten(2) @ p[f"{at}attn.c_proj.weight"].T
        x = x + F.relu(norm(x) @ p[f"{at}mlp.c_fc.weight"].T).square() @ p[f"{at}mlp.c_proj.weight"].T
    return (15 * torch.tanh(norm(x) @ p["lm_head.weight"].T / 15)).float()


@pytest.fixture
def theirs(tmp_path):
    """Writes the folder of a checkpoint, in which an older one lies too; a tokenizer is at tokenizer.json beside it."""
    byte_tokenizer().save(tmp_path / "tokenizer.json")

    def write(tensors, config=CONFIG):
        folder = tmp_path / "d2"
        folder.mkdir()
        torch.save({}, folder / "model_000100.pt")
        torch.save(tensors, folder / "model_000200.pt")
        (folder / "meta_000200.json").write_text(json.dumps({"step": 200, "model_config": config}))
        return folder

    return write


def told(tmp_path, theta=10000.0):
    return Told(tokenizer=tmp_path / "tokenizer.json", rope_theta=theta)


@pytest.mark.parametrize("theta", [10000.0, 100000.0])
def test_the_plain_generation_is_exact(theirs, tmp_path, theta):
    tensors = checkpoint()
    neutral = {"resid_lambdas": torch.ones(DEPTH), "x0_lambdas": torch.zeros(DEPTH)}
    import_folder(theirs(tensors | neutral), tmp_path / "ours", told(tmp_path, theta))
    run = load_run(str(tmp_path / "ours"), torch.device("cpu"))
    ids = torch.randint(0, IDS, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = computed(tensors, ids, theta)[..., :IDS]
    with torch.no_grad():
        assert (run.model(ids).logits[..., :IDS] - expected).abs().max() / expected.abs().max() < 1e-5


def test_it_trains_on(theirs, tmp_path, corpus, monkeypatch):
    """From the command line, to the end; the first validation is that of the weights."""
    monkeypatch.chdir(tmp_path)
    folder = theirs(checkpoint())
    with pytest.raises(SystemExit) as end:
        run_app(["import", str(folder), "ours", "--tokenizer", "tokenizer.json", "--rope-theta", "10000"])
    assert not end.value.code
    settings = ["optim.lr=1e-30", "optim.muon.lr=1e-30", "trainer.max_steps=1", "data.seq_len=32", "callbacks=none"]
    data = ["data=files", f"data.path={corpus}/*.txt", "data.out=prepared", "hardware=cpu"]
    main([*data, *settings, "init_from=ours", "hydra.run.dir=run"])
    before, after = (load_run(name, torch.device("cpu")).model.state_dict() for name in ("ours", "run"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert RunFolder(tmp_path / "run").summary.exists()


@pytest.mark.parametrize(
    ("change", "config", "part"),
    [
        ({"value_embeds.0.weight": torch.ones(260, 8)}, {}, "value_embeds"),
        ({"transformer.h.0.attn.ve_gate.weight": torch.ones(2, 8)}, {}, "ve_gate"),
        ({"smear_gate.weight": torch.ones(1, 8)}, {}, "smear"),
        ({"backout_lambda": torch.ones(1)}, {}, "backout_lambda"),
        ({"resid_lambdas": torch.tensor([1.0, 0.5])}, {}, "resid_lambdas"),
        ({"x0_lambdas": torch.tensor([0.0, 0.1])}, {}, "x0_lambdas"),
        ({}, {"window_pattern": "SSSL"}, "window_pattern"),
        ({}, {"n_head": 5}, "n_heads"),
        ({}, {"n_head": "four"}, "n_heads"),
        ({"_orig_mod.transformer.h.0.attn.c_q.weight": torch.ones(3, WIDTH)}, {}, ""),
        ({"_orig_mod.transformer.h.1.mlp.c_fc.weight": None}, {}, "h.1.mlp.c_fc"),
        ({"_orig_mod.lm_head.weight": None}, {}, "lm_head"),
        ({"surprise": torch.ones(1)}, {}, "surprise"),
        ({"code": print}, {}, "could run code"),
    ],
)
def test_what_has_no_counterpart_is_a_line(theirs, tmp_path, change, config, part):
    tensors = {name: value for name, value in (checkpoint() | change).items() if value is not None}
    with pytest.raises(UserError) as refused:
        import_folder(theirs(tensors, CONFIG | config), tmp_path / "ours", told(tmp_path))
    (line,) = refused.value.problems
    assert part in line
    assert "\n" not in line
    assert not (tmp_path / "ours").exists()


def test_what_it_does_not_record_is_asked_for(theirs, tmp_path):
    folder = theirs(checkpoint())
    for missing, option in ((Told(rope_theta=1e4), "--tokenizer"), (Told(tmp_path / "tokenizer.json"), "--rope-theta")):
        with pytest.raises(UserError, match=option):
            import_folder(folder, tmp_path / "ours", missing)
    (folder / "meta_000200.json").unlink()
    with pytest.raises(UserError, match="meta_000200"):
        import_folder(folder, tmp_path / "ours", told(tmp_path))

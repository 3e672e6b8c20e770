"""Models that travel with their own code: transformers computes what the package computes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import PATTERNS, VOCAB, make_ids, small_config, small_model

from hybridlm.config.ffns.mlp import MLPConfig
from hybridlm.config.ffns.moe import MoEConfig
from hybridlm.config.mixers.attention import AttentionConfig
from hybridlm.config.mixers.gdn import GDNConfig
from hybridlm.config.mixers.kda import KDAConfig
from hybridlm.config.mixers.mamba1 import Mamba1Config
from hybridlm.config.mixers.mamba2 import Mamba2Config
from hybridlm.config.mixers.mla import MLAConfig
from hybridlm.config.model import InitConfig
from hybridlm.errors import UserError
from hybridlm.interop.bundle import FILE
from hybridlm.interop.export import weights_of
from hybridlm.interop.foreign import read_config, read_tensors
from hybridlm.interop.links import exported, imported
from hybridlm.interop.remote import RemoteCode
from hybridlm.interop.writing import write_json

pytest.importorskip("transformers", reason="transformers is not installed")
DELTA = {"gdn": GDNConfig(head_k_dim=4, n_k_heads=2, n_v_heads=4), "kda": KDAConfig(head_k_dim=4, n_k_heads=2)}
M3 = {"mixer": "mamba3"}
OPTIONS = {
    "attention": {
        "pattern": "T Q T:moe",
        "attention": AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, rope=True, rope_fraction=0.5, gate=True),
        "variants": {"Q": {"mixer": "attention", "qk_norm": True, "scale": 0.7, "window": 3, "rope_fraction": 1.0}},
        "mlp": MLPConfig(d_ff=12, activation="relu2"),
        "logit_softcap": 3.0,
        "tie_embeddings": False,
    },
    "multipliers": {"pattern": "T M2", "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 0.25},
    "mamba1": {"pattern": "M1 M1:mlp", "mamba1": Mamba1Config(d_state=3, bias=True, d_conv=2)},
    "mamba2": {
        "pattern": "M2 P",
        "mamba2": Mamba2Config(d_state=3, head_dim=4, dt_limit=(0.1, float("inf")), chunk=5),
        "variants": {"P": {"mixer": "mamba2", "norm_before_gate": True, "dt_limit": [0.1, 0.6]}},
    },
    "mamba3": {
        "pattern": "A B C D E",
        "variants": {
            "A": M3 | {"complex_rope": False, "a_activation": "heavy_tail", "a_floor": 0.3},
            "B": M3 | {"trapezoidal": False, "use_conv": True},
            "C": M3 | {"rope_fraction": 1.0, "outproj_norm": True},
            "D": M3 | {"mimo_rank": 2, "use_conv": True, "outproj_norm": True},
            "E": M3 | {"mimo_rank": 1, "rope_fraction": 1.0, "trapezoidal": False},
        },
    },
    "mla": {
        "pattern": "L N M2",
        "mla": MLAConfig(n_heads=2, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=6),
        "variants": {"N": {"mixer": "mla", "rope": False, "q_lora_rank": 3}},
    },
    "delta": {
        "pattern": "G H K J T",
        "variants": {
            "H": {"mixer": "gdn", "use_gate": False, "use_conv": False, "allow_neg_eigval": True},
            "J": {"mixer": "kda", "gate_bias": True, "lower_bound": -5.0},
        },
    },
    "experts": {
        "pattern": "T:moe M2:moe",
        "moe": MoEConfig(
            n_experts=4,
            top_k=2,
            d_expert=6,
            router="sigmoid",
            n_expert_groups=2,
            routed_scaling_factor=1.5,
            norm_topk_prob=False,
            activation="relu2",
        ),
    },
}


def section(case):
    return small_config(**DELTA | OPTIONS.get(case, {"pattern": case}))


def write_folder(model, folder):
    """What export writes, without the tokenizer."""
    code = RemoteCode()
    config = code.config(model.config, model.vocab_size)
    write_json(folder / "config.json", config | {"architectures": [code.name], "model_type": code.model_type})
    weights = exported(code.links(model.config), weights_of(model))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, text in code.files(model.config).items():
        (folder / name).write_text(text, encoding="utf-8")


def load_class(folder):
    """The file's own class, imported beside hybridlm."""
    name = f"remote_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, folder / FILE)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HybridLMForCausalLM


def pair(case, folder, dtype=torch.float64):
    ours = small_model(section(case), dtype).eval()
    write_folder(ours, folder)
    return ours, load_class(folder).from_pretrained(folder, dtype=dtype).eval()


def written(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"do_sample": False, "max_new_tokens": 12} | settings
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)


def near(got, wanted):
    """The embedding has fewer rows, and products of other shapes are rounded differently."""
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", [*PATTERNS, *OPTIONS])
class TestEveryKind:
    """Of layer, and every option."""

    @pytest.fixture
    def models(self, case, tmp_path):
        return pair(case, tmp_path)

    def test_logits_loss_and_gradients(self, models):
        ours, theirs = models
        ids = make_ids(3, 17)
        near(theirs(ids).logits, ours(ids).logits)
        near(theirs(ids, use_cache=False).logits, ours(ids).logits)
        labels = ids.masked_fill(torch.arange(17) % 5 == 0, -100)
        targets = torch.cat((labels[:, 1:], labels.new_full((3, 1), -100)), 1)
        output = ours(ids, targets=targets)
        expected = output.loss_sum / output.n_tokens + (0.0 if output.aux is None else output.aux)
        loss = theirs.train()(ids, labels=labels).loss
        near(loss, expected)
        for one in (loss, expected):
            one.backward()
        mine = dict(ours.named_parameters())
        for name, parameter in theirs.model.named_parameters():
            wanted = mine[name].grad[:VOCAB] if name in ("embedding.weight", "lm_head.weight") else mine[name].grad
            near(parameter.grad, wanted)

    def test_generate_with_cache_and_left_padding(self, models):
        ours, theirs = models
        ids, mask = make_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
        mask[1, :4] = 0
        text = written(theirs, ids, mask)
        with torch.no_grad():
            for row, kept in zip(text, (9, 5), strict=True):
                logits = ours(row[None, 9 - kept :]).logits[0, kept - 1 : -1]
                assert torch.equal(logits.argmax(-1), row[9:])
        assert torch.equal(written(theirs, ids, mask, use_cache=False), text)

    def test_the_folder_is_imported_bit_for_bit(self, models, tmp_path):
        ours, _ = models
        found = read_config(tmp_path)
        assert found.vocab == VOCAB
        assert [(one.params, one.ffn) for one in found.section.layers] == [
            (one.params, one.ffn) for one in ours.config.layers
        ]
        back = imported(found.architecture.links(found.section), read_tensors(tmp_path), "here")
        expected = weights_of(ours)
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[name], expected[name]) for name in expected)


@pytest.fixture
def models(tmp_path):
    return pair("T M3:moe L", tmp_path)


def test_a_cache_is_handed_on(models):
    """Between calls of generate, in pieces of any length, under both of its names, and to several beams."""
    _, theirs = models
    ids = make_ids(2, 9)
    text = written(theirs, ids)
    first = written(theirs, ids, return_dict_in_generate=True, max_new_tokens=5)
    name = next(name for name in ("cache", "past_key_values") if name in first)
    assert torch.equal(written(theirs, first.sequences, **{name: first[name], "max_new_tokens": 7}), text)
    whole = theirs(ids).logits
    for name in ("cache", "past_key_values"):
        output = theirs(ids[:, :4], use_cache=True)
        output = theirs(ids[:, 4:], **{name: output[1]})
        near(output.logits, whole[:, 4:])
    assert torch.equal(written(theirs, ids, num_beams=3), written(theirs, ids, num_beams=3, use_cache=False))
    assert written(theirs, ids, do_sample=True, num_return_sequences=2, max_new_tokens=3).shape == (4, 12)


def test_a_cache_has_room_for_any_length(tmp_path):
    ours, theirs = pair("T W M3", tmp_path)
    text = written(theirs, make_ids(1, 5), max_new_tokens=600)
    with torch.no_grad():
        assert torch.equal(ours(text).logits[0, 4:-1].argmax(-1), text[0, 5:])


def test_which_columns_get_logits(models):
    _, theirs = models
    ids = make_ids(2, 9)
    whole = theirs(ids).logits
    some = torch.tensor([2, 5])
    for keep, columns in ((1, slice(-1, None)), (4, slice(-4, None)), (50, slice(None)), (some, some)):
        near(theirs(ids, logits_to_keep=keep).logits, whole[:, columns])
    assert len(theirs(ids, labels=ids, use_cache=False, return_dict=False)) == 2


def test_padding_is_no_target_and_a_batch_may_weigh_the_loss(models):
    _, theirs = models
    ids, mask = make_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = mask[1, 6:] = 0
    rows = [theirs(ids[:1, 4:], labels=ids[:1, 4:]), theirs(ids[1:, :6], labels=ids[1:, :6])]
    expected = (4 * rows[0].loss + 5 * rows[1].loss) / 9
    near(theirs(ids, attention_mask=mask, labels=ids).loss, expected)
    near(theirs(ids, attention_mask=mask, labels=ids, num_items_in_batch=3).loss, 3 * expected)
    for shape in ((2, 1, 9, 9), (2, 8), (2, 10)):
        with pytest.raises(ValueError, match="attention_mask"):
            theirs(ids, attention_mask=torch.ones(shape))


def test_checkpointed_blocks_give_the_same_gradients(models):
    _, theirs = models
    gradients = []
    for _ in range(2):
        theirs.zero_grad()
        theirs.train()(make_ids(2, 9), labels=make_ids(2, 9)).loss.backward()
        gradients.append([parameter.grad for parameter in theirs.parameters()])
        theirs.gradient_checkpointing_enable()
    assert theirs.model.checkpoint_blocks
    assert all(torch.equal(*two) for two in zip(*gradients, strict=True))


def test_rounded_weights_keep_the_same_exceptions(tmp_path):
    ours = small_model(section("T:moe M1 M2 M3 X G K"), torch.float32).eval()
    write_folder(ours, tmp_path)
    ours.round_parameters(torch.bfloat16)
    theirs = load_class(tmp_path).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    mine = weights_of(ours)
    for name, tensor in theirs.model.state_dict().items():
        assert tensor.dtype == mine[name].dtype, name
        assert torch.equal(tensor, mine[name]), name


def test_saved_again_it_is_loaded_and_imported(models, tmp_path):
    _, theirs = models
    ids, again = make_ids(2, 9), tmp_path / "again"
    theirs.save_pretrained(again)
    shutil.copy(tmp_path / FILE, again)
    saved = load_file(again / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "model.safetensors").keys()
    assert torch.equal(type(theirs).from_pretrained(again, dtype=torch.float64).eval()(ids).logits, theirs(ids).logits)
    assert read_config(again).section == read_config(tmp_path).section
    theirs.resize_token_embeddings(VOCAB + 3)
    assert theirs(ids).logits.shape[-1] == theirs.config.vocab_size == VOCAB + 3


def test_fresh_weights_are_drawn_as_in_training(tmp_path):
    config = section("T:moe M1 M2 M3 X L G K").model_copy(update={"vocab_multiple": 1, "init": InitConfig(std=0.3)})
    ours = small_model(config, torch.float32)
    write_folder(ours, tmp_path)
    made = load_class(tmp_path)
    torch.manual_seed(3)
    ours.reset_parameters()
    fresh = made(made.config_class.from_pretrained(tmp_path))
    torch.manual_seed(3)
    fresh.initialize_weights()
    for name, tensor in fresh.model.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_only_what_a_checkpoint_lacks_is_drawn(models, tmp_path):
    _, theirs = models
    tensors = load_file(tmp_path / "model.safetensors")
    missing = "model.blocks.1.mixer.D"
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(theirs).from_pretrained(tmp_path, dtype=torch.float64)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, torch.ones_like(tensor) if name == missing else tensors[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"source": None},
        {"source": {"pattern": "T T"}},
        {"source": {"pattern": "T*1000000"}},
        {"parts": {"attention": {"kind": "attention.Attention", "n_heads": 3}}},
        {"logit_softcap": 5.0},
        {"blocks": [["attention", None]]},
        {"new_gate": True},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_folder_that_says_two_things_is_not_imported(tmp_path, changes):
    write_folder(small_model(section("T M2")), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as refused:
        read_config(tmp_path)
    assert len(refused.value.problems) == 1


def test_an_older_transformers_is_refused(models, monkeypatch):
    _, theirs = models
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"4\.57\.6"):
        type(theirs)(theirs.config)


def test_a_folder_of_an_earlier_version_is_imported(tmp_path):
    """Which lacks the fields that were added since."""
    write_folder(small_model(section("T M2")), tmp_path)
    expected, path = read_config(tmp_path).section, tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["source"]["logit_softcap"], config["source"]["attention"]["gate"], config["parts"]["attention"]["gate"]
    path.write_text(json.dumps(config))
    assert read_config(tmp_path).section.layers == expected.layers


WITHOUT_HYBRIDLM = """
import json, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hybridlm":
            raise ImportError("hybridlm is not here")

sys.meta_path.insert(0, Refused())
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float64)
ids = torch.tensor(json.loads(sys.argv[2]))
mask = torch.ones_like(ids)
text = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
loss = model.train()(ids, labels=ids).loss
loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())
print(json.dumps([text.tolist(), float(loss), "hybridlm" in sys.modules]))
"""


def test_it_runs_where_hybridlm_is_not(tmp_path):
    _, theirs = pair("T M1 M2 M3 X L G K T:mlp", tmp_path)
    ids = make_ids(2, 9)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_HYBRIDLM, str(tmp_path), json.dumps(ids.tolist())],
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text, loss, there = json.loads(done.stdout.splitlines()[-1])
    assert not there
    assert torch.equal(torch.tensor(text), written(theirs, ids))
    assert loss == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-12)

"""What import reads of strangers: refused in a line, quickly and in little memory; nothing is executed, nothing is
written outside, nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct

import pytest
import torch
from architecture_cases import CASES, write_folder
from hostile import VALUES, little, mutated, refused_or_read
from hostile import tensors as strange_tensors
from safetensors.torch import load_file, save_file
from untrained import untrained_run

from hybridlm.cli.verbs import run_app
from hybridlm.config.data import DataConfig
from hybridlm.config.load import validate_model
from hybridlm.config.run import RunConfig
from hybridlm.data.tokenizer import byte_tokenizer
from hybridlm.errors import UserError
from hybridlm.files.sealed import write_sealed
from hybridlm.interop import importing, state_spaces
from hybridlm.interop.architectures import ARCHITECTURES
from hybridlm.interop.importing import import_folder
from hybridlm.interop.incoming import Told
from hybridlm.interop.links import exported
from hybridlm.interop.remote import RemoteCode
from hybridlm.model.build import build_model
from hybridlm.runs.checkpoint import KEY, load_run, read_weights, weights_of
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.initial import given_weights

NORM, SINGLE, INDEX = "model.norm.weight", "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch touched') }}"
SECTION = {"d_model": 32, "pattern": "T", "attention": {"n_heads": 2, "rope": True}}
EDGE = [None, [], {}, -1, 0, float("nan"), "x", 1e300, True, 10**9, -(10**9), 2**40, 10**30, [{}], "M" * 2000]


def new_folder(path, case):
    path.mkdir()
    write_folder(path, case)
    byte_tokenizer().save(path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return new_folder(tmp_path_factory.mktemp("honest") / "granite", "GraniteMoeHybridForCausalLM")


@pytest.fixture
def theirs(honest, tmp_path, monkeypatch):
    """A copy in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(honest, tmp_path / "theirs")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def retyped(folder, dtype):
    change_tensors(folder, lambda tensors: tensors.update({NORM: torch.ones(32).to(dtype)}))


def poisoned(folder, value):
    change_tensors(folder, lambda tensors: tensors[NORM].__setitem__(3, value))


def shard(folder, name, **more):
    """An index whose tensors are all in the file ``name``, except for ``more``."""
    names = load_file(folder / SINGLE) if (folder / SINGLE).is_file() else [NORM]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name) | more}))


def change_header(folder, change):
    """``change`` gets the header of the safetensors file, and may return other bytes for it."""
    content = (folder / SINGLE).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    text = change(header) or json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def norm(**changes):
    return lambda header: header[NORM].update(changes)


def replaced(folder, name, make):
    (folder / name).unlink()
    make(folder / name)


def outside(folder, name):
    shutil.move(folder / name, folder.parent.parent / f"{folder.parent.name}-{name}")
    (folder / name).symlink_to(folder.parent.parent / f"{folder.parent.name}-{name}")


class Code:
    def __reduce__(self):
        return open, ("touched", "w")


def pickled(folder, name):
    (folder / name).write_bytes(pickle.dumps({NORM: Code()}))
    (folder / SINGLE).unlink()


REFUSED = {
    "another architecture": lambda f: change_config(f, architectures=["GPT2LMHeadModel"]),
    "an architecture of lists": lambda f: change_config(f, architectures=[["x"]], model_type={}),
    "a multiplier that is not a number": lambda f: change_config(f, residual_multiplier="x"),
    "a field without counterpart": lambda f: change_config(f, attention_bias=True),
    "scaled positions": lambda f: change_config(f, rope_scaling={"rope_type": "yarn", "factor": 4}),
    "a field of tomorrow": lambda f: change_config(f, mamba_gating="new"),
    "ids without end": lambda f: change_config(f, vocab_size=2**40),
    "as many ids as an int holds": lambda f: change_config(f, vocab_size=2**31 - 1),
    "fewer ids than its tokenizer": lambda f: change_config(f, vocab_size=100),
    "layers without end": lambda f: change_config(f, layer_types=["mamba"] * 10_000),
    "a width without end": lambda f: change_config(f, hidden_size=2**40),
    "a width that no tensor has": lambda f: change_config(f, shared_intermediate_size=10**30),
    "experts without end": lambda f: change_config(
        f, num_local_experts=10**9, num_experts_per_tok=1, intermediate_size=8
    ),
    "not JSON": lambda f: (f / "config.json").write_text("{"),
    "not text": lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"),
    "a list": lambda f: (f / "config.json").write_text("[]"),
    "a bottomless list": lambda f: (f / "config.json").write_text("[" * 10**6),
    "a bottomless field": lambda f: change_config(f, quantization_config=json.loads("[" * 200 + "]" * 200)),
    "a number without end": lambda f: (f / "config.json").write_text('{"vocab_size": ' + "1" * 10**6 + "}"),
    "a config of 2 MB": lambda f: change_config(f, layer_types=["mamba"] * 200_000),
    "a field twice": lambda f: (f / "config.json").write_text('{"vocab_size": 9, "vocab_size": 260}'),
    "a config that is a folder": lambda f: replaced(f, "config.json", lambda path: path.mkdir()),
    "a config that is a pipe": lambda f: replaced(f, "config.json", os.mkfifo),
    "a config that is a device": lambda f: replaced(f, "config.json", lambda path: path.symlink_to("/dev/zero")),
    "a config that links to itself": lambda f: replaced(f, "config.json", lambda path: path.symlink_to(path)),
    "a config elsewhere": lambda f: outside(f, "config.json"),
    "no config": lambda f: (f / "config.json").unlink(),
    "a missing tensor": lambda f: change_tensors(f, lambda tensors: tensors.pop(NORM)),
    "an extra tensor": lambda f: change_tensors(f, lambda tensors: tensors.update(extra=torch.ones(2))),
    "a name that writes to the terminal": lambda f: change_tensors(
        f, lambda tensors: tensors.update({"\x1b[2Jx\n": torch.ones(2)})
    ),
    "a misshapen tensor": lambda f: change_tensors(f, lambda tensors: tensors.update({NORM: torch.ones(7)})),
    "an empty tensor": lambda f: change_tensors(f, lambda tensors: tensors.update({NORM: torch.ones(0, 2**40)})),
    "a tensor without axes": lambda f: change_tensors(f, lambda tensors: tensors.update({NORM: torch.ones(())})),
    "nan": lambda f: poisoned(f, float("nan")),
    "infinity": lambda f: poisoned(f, float("-inf")),
    "integers": lambda f: retyped(f, torch.long),
    "truth values": lambda f: retyped(f, torch.bool),
    "eight bits": lambda f: retyped(f, torch.float8_e4m3fn),
    "eight other bits": lambda f: retyped(f, torch.float8_e5m2),
    "complex numbers": lambda f: retyped(f, torch.complex64),
    "truncated": lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-9]),
    "too long": lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"more"),
    "empty": lambda f: (f / SINGLE).write_bytes(b""),
    "a header without end": lambda f: (f / SINGLE).write_bytes(b"\xff" * 40),
    "a header past the end": lambda f: (f / SINGLE).write_bytes(struct.pack("<Q", 2**20) + b"{}"),
    "a header that is no JSON": lambda f: change_header(f, lambda header: b"{nothing}"),
    "a header that is a list": lambda f: change_header(f, lambda header: b"[]"),
    "a bottomless header": lambda f: change_header(f, lambda header: b"[" * 10**6),
    "offsets out of range": lambda f: change_header(f, norm(data_offsets=[2**40, 2**40 + 128])),
    "offsets that overlap": lambda f: change_header(f, norm(data_offsets=[0, 128])),
    "offsets that go back": lambda f: change_header(f, norm(data_offsets=[128, 0])),
    "a gigantic shape": lambda f: change_header(f, norm(shape=[2**40, 2**40])),
    "a shape that overflows": lambda f: change_header(f, norm(shape=[2**63, 2])),
    "a shape of less than its bytes": lambda f: change_header(f, norm(shape=[1])),
    "an unknown dtype": lambda f: change_header(f, norm(dtype="F7")),
    "weights that are a folder": lambda f: replaced(f, SINGLE, lambda path: path.mkdir()),
    "weights that are a pipe": lambda f: replaced(f, SINGLE, os.mkfifo),
    "weights that are a device": lambda f: replaced(f, SINGLE, lambda path: path.symlink_to("/dev/zero")),
    "weights that are nowhere": lambda f: replaced(f, SINGLE, lambda path: path.symlink_to(f / "nothing")),
    "weights elsewhere": lambda f: outside(f, SINGLE),
    "a shard above": lambda f: shard(f, f"../{SINGLE}"),
    "a shard at the root": lambda f: shard(f, f"/{SINGLE}"),
    "a shard with a zero byte": lambda f: shard(f, f"a\0{SINGLE}"),
    "a shard with a long name": lambda f: shard(f, "a" * 10_000 + ".safetensors"),
    "a shard that is not there": lambda f: shard(f, "model-1.safetensors"),
    "a shard that is a pickle": lambda f: (shard(f, "model.bin"), pickled(f, "model.bin")),
    "a shard that is a pipe": lambda f: (shard(f, "a.safetensors"), os.mkfifo(f / "a.safetensors")),
    "a shard elsewhere": lambda f: (outside(f, SINGLE), shard(f, SINGLE)),
    "an index that lacks a tensor": lambda f: (
        shard(f, SINGLE),
        (f / INDEX).write_text((f / INDEX).read_text().replace(NORM, "x")),
    ),
    "an index with a tensor too many": lambda f: shard(f, SINGLE, more=SINGLE),
    "a tensor in two shards": lambda f: (
        shutil.copy(f / SINGLE, f / "b.safetensors"),
        shard(f, SINGLE, more="b.safetensors"),
    ),
    "an index of lists": lambda f: (f / INDEX).write_text('{"weight_map": []}'),
    "an index of numbers": lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'),
    "an empty index": lambda f: (f / INDEX).write_text('{"weight_map": {}}'),
    "an index that is no JSON": lambda f: (f / INDEX).write_text("x"),
    "an index that says it twice": lambda f: (f / INDEX).write_text(
        f'{{"weight_map": {{"{NORM}": "b", "{NORM}": "{SINGLE}"}}}}'
    ),
    "an index of 20 MB": lambda f: (f / INDEX).write_text(" " * (20 * 2**20)),
    "an index that is a pipe": lambda f: os.mkfifo(f / INDEX),
    "a pickle alone": lambda f: pickled(f, "pytorch_model.bin"),
    "a pickle of a checkpoint": lambda f: pickled(f, "model.pt"),
    "a pickle without a config": lambda f: (pickled(f, "pytorch_model.bin"), (f / "config.json").unlink()),
    "a pickle of torch": lambda f: (
        torch.save({NORM: Code()}, f / "pytorch_model.bin"),
        (f / SINGLE).unlink(),
        (f / "config.json").unlink(),
    ),
    "a pickle like nanochat's": lambda f: (pickled(f, "model_000100.pt"), (f / "meta_000100.json").write_text("{}")),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "a pickled tokenizer": lambda f: (
        (f / "tokenizer.json").unlink(),
        (f / "tokenizer.pkl").write_bytes(pickle.dumps(Code())),
    ),
    "a tokenizer that is a pickle": lambda f: (f / "tokenizer.json").write_bytes(pickle.dumps(Code())),
    "a tokenizer that is a list": lambda f: (f / "tokenizer.json").write_text("[]"),
    "a tokenizer that is a pipe": lambda f: replaced(f, "tokenizer.json", os.mkfifo),
    "a tokenizer elsewhere": lambda f: outside(f, "tokenizer.json"),
    "a bottomless tokenizer": lambda f: (f / "tokenizer.json").write_text('{"a":' * 10**5),
    "a tokenizer_config that is a list": lambda f: (f / "tokenizer_config.json").write_text("[]"),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_strangers_folder_is_refused_in_a_line(theirs, change, tmp_path):
    change(theirs)
    assert not refused_or_read(lambda: import_folder(theirs, tmp_path / "runs" / "new"))
    assert os.listdir(tmp_path) == ["theirs"]


def test_the_command_ends_with_code_2(theirs, tmp_path, capsys):
    change_config(theirs, mamba_gating="\x1b[2J")
    with pytest.raises(SystemExit) as end:
        run_app(["import", str(theirs), str(tmp_path / "new")])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["theirs"]


def test_code_and_templates_are_neither_run_nor_kept(theirs, tmp_path):
    change_config(
        theirs, auto_map={"AutoModelForCausalLM": "planted.Model", "AutoTokenizer": ["planted.Tokenizer", None]}
    )
    (theirs / "planted.py").write_text("open('touched', 'w')")
    (theirs / "training_args.bin").write_bytes(pickle.dumps(Code()))
    (theirs / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE, "auto_map": {"AutoTokenizer": ["planted.T"]}}
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
    import_folder(theirs, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "theirs"]
    assert sorted(os.listdir(tmp_path / "new")) == ["config.yaml", "tokenizer.json", "weights.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_no_value_of_another_precision_is_lost(theirs, dtype, tmp_path):
    """Others round every tensor, also those that ours keep in fp32."""
    change_tensors(theirs, lambda tensors: tensors.update({name: one.to(dtype) for name, one in tensors.items()}))
    import_folder(theirs, tmp_path / "new")
    given, back = load_file(theirs / SINGLE), load_run(str(tmp_path / "new"), torch.device("cpu")).model.state_dict()
    names = {"blocks.0.mixer.A_log": "model.layers.0.mamba.A_log", "norm.weight": NORM}
    names["embedding.weight"] = "model.embed_tokens.weight"
    assert all(torch.equal(back[ours], given[name].to(back[ours].dtype)) for ours, name in names.items())
    assert back["blocks.0.mixer.A_log"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert back["embedding.weight"].dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_a_folder_in_the_cache_of_a_hub_is_read(theirs, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in theirs.iterdir():
        shutil.move(path, blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    import_folder(snapshot, tmp_path / "new")


def test_shards_that_their_index_describes_are_read(theirs, tmp_path):
    tensors = load_file(theirs / SINGLE)
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for name, part in zip("ab", parts, strict=True):
        save_file(part, theirs / f"{name}.safetensors")
    names = {tensor: f"{'ab'[i]}.safetensors" for i, part in enumerate(parts) for tensor in part}
    (theirs / INDEX).write_text(json.dumps({"weight_map": names}))
    (theirs / SINGLE).unlink()
    import_folder(theirs, tmp_path / "new")


@pytest.mark.parametrize("seed", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.slow)], ids=len)
def test_a_mutated_header_is_refused_or_read(theirs, seed, tmp_path):
    honest = (theirs / SINGLE).read_bytes()
    for number in seed:
        generator = random.Random(number)
        (theirs / SINGLE).write_bytes(honest)

        def change(header, generator=generator):
            return json.dumps(mutated(header, generator, lambda one: one.choice(VALUES))).encode()

        change_header(theirs, change)
        if refused_or_read(lambda: import_folder(theirs, tmp_path / "new")):
            shutil.rmtree(tmp_path / "new")
        assert os.listdir(tmp_path) == ["theirs"]


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [case for case in CASES if "," not in case])
def test_a_tensor_of_another_shape_is_refused(case, count, tmp_path):
    """count: of the tensors."""
    folder = new_folder(tmp_path / "theirs", case)
    honest = load_file(folder / SINGLE)
    names = sorted(honest)
    for name in random.Random(case).sample(names, min(count, len(names))):
        for strange in (torch.ones(()), torch.ones(3), torch.ones(2, 3, 5, 7), torch.ones(32, 32, dtype=torch.long)):
            save_file(honest | {name: strange}, folder / SINGLE)
            assert not refused_or_read(lambda: import_folder(folder, tmp_path / "new")), (name, strange.shape)
    assert os.listdir(tmp_path) == ["theirs"]


def fields_of(config):
    """The path of every field, also of those in objects."""
    for key, value in config.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *path) for path in fields_of(value))


@pytest.mark.parametrize("count", [2, pytest.param(len(EDGE), marks=pytest.mark.slow)])
@pytest.mark.parametrize("one", [*ARCHITECTURES, RemoteCode()], ids=lambda one: one.model_type)
def test_a_field_of_any_kind_is_refused_or_read(one, count, tmp_path, monkeypatch):
    """Every field of a config.json in turn is something else. count: of the values that each is given."""
    generator = random.Random(one.name)
    case = next((case for case in reversed(CASES) if case.startswith(one.name)), "Mamba2ForCausalLM")
    folder, tokenizer = new_folder(tmp_path / "theirs", case), byte_tokenizer()
    monkeypatch.setattr(importing, "load_tokenizer", lambda path: tokenizer)
    if isinstance(one, RemoteCode):
        run = RunFolder(tmp_path / "run")
        import_folder(folder, run.path)
        ours = read_weights(run.weights)
        save_file({f"model.{name}": tensor for name, tensor in weights_of(ours).items()}, folder / SINGLE)
        section = validate_model(ours[KEY]["model"])
        names = {"architectures": [one.name], "model_type": one.model_type}
        (folder / "config.json").write_text(json.dumps(one.config(section, 260) | names))
    config = json.loads((folder / "config.json").read_text())
    import_folder(folder, tmp_path / "whole")
    for path in fields_of(config):
        for value in generator.sample(EDGE, count):
            changed = json.loads(json.dumps(config))
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
            (folder / "config.json").write_text(json.dumps(changed))
            if refused_or_read(lambda: import_folder(folder, tmp_path / "new")):
                shutil.rmtree(tmp_path / "new")
            assert not (tmp_path / "new").exists(), (path, value)


@pytest.fixture
def run(tmp_path):
    return untrained_run(tmp_path / "run", SECTION)


def test_weights_that_are_not_finite_start_no_run_and_are_not_exported(run, tmp_path, capsys):
    ours = read_weights(RunFolder(run).weights)
    weights = weights_of(ours)
    weights["norm.weight"][0] = float("inf")
    write_sealed(RunFolder(run).weights, KEY, ours[KEY] | {"step": 0}, weights)
    with pytest.raises(UserError, match=r"norm\.weight"):
        given_weights(RunConfig(data=DataConfig(), init_from=str(run), model=validate_model(SECTION)))
    for words in (["export", str(run), str(tmp_path / "new")], ["generate", str(run), "-p", "a", "-n", "2"]):
        with pytest.raises(SystemExit) as end:
            run_app(words)
        assert end.value.code in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_little_is_enough_for_an_honest_folder(theirs, tmp_path):
    with little():
        import_folder(theirs, tmp_path / "new")


def ssm_folder(path, pattern):
    """A checkpoint of mamba_ssm."""
    section = validate_model(
        {"d_model": 32, "pattern": pattern, "mamba2": {"head_dim": 16, "d_state": 8}, "mamba3": {"head_dim": 16}}
        | {"vocab_multiple": 1}
    )
    model = build_model(section, 257).to_empty(device="cpu")
    model.reset_parameters()
    (path / "config.json").write_text(json.dumps({"ssm_cfg": {"ngroups": 1, "dt_limit": [0.0, 1.0], "A_floor": 1e-4}}))
    return "pytorch_model.bin", exported(state_spaces._links(section, {}), model.state_dict())


def nanochat_folder(path):
    tensors = {"transformer.wte.weight": torch.randn(260, 32), "lm_head.weight": torch.randn(260, 32)}
    for i in range(2):
        tensors |= {f"transformer.h.{i}.attn.c_{name}.weight": torch.randn(32, 32) for name in ("q", "k", "v", "proj")}
        tensors[f"transformer.h.{i}.mlp.c_fc.weight"] = torch.randn(64, 32)
        tensors[f"transformer.h.{i}.mlp.c_proj.weight"] = torch.randn(32, 64)
    (path / "meta_000100.json").write_text(
        json.dumps({"model_config": {"n_head": 2, "n_kv_head": 2, "sequence_len": 8}})
    )
    return "model_000100.pt", tensors


CHECKPOINTS = {
    "mamba1": lambda path: ssm_folder(path, "M1*2"),
    "mamba2": lambda path: ssm_folder(path, "M2:mlp*2"),
    "mamba3": lambda path: ssm_folder(path, "M3*2"),
    "nanochat": nanochat_folder,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("seed", [range(25), pytest.param(range(25, 1000), marks=pytest.mark.slow)], ids=len)
def test_a_mutated_checkpoint_is_refused_or_read(kind, seed, tmp_path):
    folder, tokenizer = tmp_path / "theirs", tmp_path / "tokenizer.json"
    folder.mkdir()
    byte_tokenizer().save(tokenizer)
    name, tensors = CHECKPOINTS[kind](folder)
    (beside,) = folder.iterdir()
    config = json.loads(beside.read_text())
    told = Told(tokenizer, 10_000.0 if kind == "nanochat" else None, "softplus" if kind == "mamba3" else None)
    torch.save(tensors, folder / name)
    import_folder(folder, tmp_path / "whole", told)
    for number in seed:
        generator = random.Random(number)
        if number % 2:
            beside.write_text(json.dumps(mutated(config, generator, lambda one: one.choice(VALUES))))
        else:
            torch.save(mutated(tensors, generator, strange_tensors), folder / name)
        if refused_or_read(lambda: import_folder(folder, tmp_path / "new", told)):
            shutil.rmtree(tmp_path / "new")
        assert sorted(os.listdir(tmp_path)) == ["theirs", "tokenizer.json", "whole"]

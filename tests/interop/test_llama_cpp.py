"""GGUF files in llama.cpp: logits, greedy text, tokens, and what rounding costs. PYTHONPATH may name a folder with
llama_cpp."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from llama_cpp_models import MODELS, section_of
from untrained import untrained_run

from hybridlm.cli.compose import compose_config
from hybridlm.data.preparing.prepare import prepare
from hybridlm.interop.gguf.export import export_gguf, run_llama_cpp
from hybridlm.interop.reference import TOLERANCE, write_reference
from hybridlm.runs.checkpoint import load_run
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.run import run as train

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = pytest.mark.slow
PORTABLE = ["model/style=portable", "data.tokenizer.split=llama3", "data.seq_len=256", "data.global_batch=8"]
TRAINED = {
    "granitehybrid": ["model=hybrid_small"],
    "mamba2": ["model=mamba2", "model.ffn_after.mamba2=none"],
    "llama": ["model=transformer"],
    "deepseek2": ["model=mla_moe"],
}
SIZE = ["size=small", "model.n_layers=4", "model.d_model=128", "trainer.max_steps=300", "trainer.val_every=null"]
LENGTH = 256
TEXTS = (
    "it's WE'LL don't f'type'",
    "naïve e\u0301 ☃ 你好 12345 १२३४",
    "  two\t\tspaces \r\n\n\n  x\u00a0y\u2003z",
    "<|user|>🙂",
)


def loaded(path):
    return load_run(str(path), torch.device("cpu"))


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_every_architecture_computes_the_same(case, dtype, tmp_path):
    run = loaded(untrained_run(tmp_path / "run", section_of(case), every=True))
    agreement = export_gguf(run, tmp_path / "x.gguf", arch=case.split(",")[0], dtype=dtype).agreement
    print(case, dtype, agreement)
    if dtype == "f32":
        assert agreement.logits < TOLERANCE
        assert agreement.greedy == (24, 24)


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, tmp_path_factory):
    """A run of some minutes on the interpreter's library."""
    config = compose_config([*TRAINED[request.param], *PORTABLE, *SIZE, "hardware=cpu"])
    folder = RunFolder(tmp_path_factory.mktemp(request.param) / "run")
    train(config, folder, None)
    return request.param, folder.path, config


def test_a_trained_model_writes_the_same_text(trained, tmp_path):
    name, path, config = trained
    run = loaded(path)
    files = {dtype: tmp_path / f"{dtype}.gguf" for dtype in ("f32", "q8_0")}
    for dtype, file in files.items():
        done = export_gguf(run, file, dtype=dtype)
        assert done.name == f"{name}, {dtype}"
        print(name, dtype, done.agreement, *done.notes)
    write_reference(tmp_path / "reference", run.model.float(), run.tokenizer, new=64)
    report = run_llama_cpp(files["f32"], tmp_path / "reference")
    print(name, report)
    assert report["logits"] < TOLERANCE
    assert report["greedy"] == [64, 64]
    held_out = prepare(config.data).parts[0].val.stream
    ids = held_out.read(0, 16 * LENGTH).astype(np.int64).reshape(16, LENGTH)
    ours = perplexity(run.model(torch.from_numpy(ids)).logits.detach().numpy(), ids)
    llama = {dtype: opened(file) for dtype, file in files.items()}
    theirs = {dtype: perplexity(np.stack([scores(one, row) for row in ids]), ids) for dtype, one in llama.items()}
    print(name, "perplexity", ours, theirs)
    assert theirs["f32"] == pytest.approx(ours, rel=1e-4)
    assert theirs["q8_0"] == pytest.approx(ours, rel=0.01)
    text = run.tokenizer.decode(held_out.read(0, min(len(held_out), 100_000)).tolist())
    for sample in (*TEXTS, text):
        assert llama["f32"].tokenize(sample.encode(), add_bos=False, special=False) == run.tokenizer.encode(sample)


def opened(path):
    return llama_cpp.Llama(str(path), n_ctx=LENGTH, logits_all=True, type_k=0, type_v=0, n_gpu_layers=0, verbose=False)


def scores(llama, ids):
    llama.reset()
    llama.eval(ids.tolist())
    return np.array(llama.scores[: len(ids)])


def perplexity(logits, ids):
    logits = torch.from_numpy(logits)[:, :-1].flatten(0, 1).double()
    return math.exp(torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids)[:, 1:].flatten()))

"""Where torch and transformers are installed and hybridlm is not, exported folders write what the run writes."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from importlib.metadata import version

import pytest
import torch

import hybridlm
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.interop.export import export_code, export_hf
from hybridlm.runs.checkpoint import load_run

pytest.importorskip("transformers", reason="transformers is not installed")
TOKENS = 48
PROMPTS = ["def f1(x):\n", "    return x", "d"]
MODELS = {
    "native": ["model.pattern=M:mlp T M:mlp"],
    "Mamba-3 and latent attention": [
        "model.pattern=M3 L:moe X T:mlp",
        "+model.variants.X={mixer: mamba3, mimo_rank: 2}",
    ],
    "caps, windows and Mamba-1": [
        "model.pattern=W M1 T:mlp",
        "+model.variants.W={mixer: attention, window: 8, rope: true}",
        "model.logit_softcap=15.0",
    ],
    "delta rules": ["model.pattern=G K T:mlp", "model.gdn.head_k_dim=8", "model.kda.head_k_dim=8"],
}
SCRIPT = """
import importlib.util, json, sys

assert importlib.util.find_spec("hybridlm") is None
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, prompts, tokens = json.loads(sys.argv[1])
trust = folder.endswith("code")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
writer = pipeline("text-generation", model=folder, trust_remote_code=trust)
piped = [writer(prompt, max_new_tokens=tokens, do_sample=False)[0]["generated_text"] for prompt in prompts]
ids = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
rows = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
print(json.dumps([piped, tokenizer.batch_decode(rows, skip_special_tokens=True)]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Of an environment that holds the installed versions of torch and transformers, without those who need them."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    path = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    done = subprocess.run(
        [path, "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip installs no {' '.join(wanted)}: {done.stderr.strip().splitlines()[-1]}")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_the_same(name, python, tiny, tmp_path):
    config = hybridlm.compose([*tiny, "trainer.max_steps=60", "callbacks=none", *MODELS[name]])
    run = str(hybridlm.train(config, tmp_path / "run").folder)
    loaded = load_run(run, torch.device("cpu"))
    sampling = Sampling(temperature=0, max_new_tokens=TOKENS, stop_ids=(loaded.tokenizer.eos_id,))
    rows = Engine(loaded.model, loaded.tokenizer).generate([loaded.tokenizer.encode(one) for one in PROMPTS], sampling)
    expected = [prompt + row.text for prompt, row in zip(PROMPTS, rows, strict=True)]
    export_code(load_run(run, torch.device("cpu")), tmp_path / "code")
    if name == "native":
        export_hf(load_run(run, torch.device("cpu")), tmp_path / "native")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for folder in {"code", name} & {"code", "native"}:
        done = subprocess.run(
            [python, "-I", "-c", SCRIPT, json.dumps([str(tmp_path / folder), PROMPTS, TOKENS])],
            env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected], folder

"""``hybridlm export --to gguf``: a trained run as one file for llama.cpp and what is built on it."""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridlm.config.model import ModelConfig
from hybridlm.data.preparing.prepare import held_out_text
from hybridlm.errors import RunFailed, UserError
from hybridlm.interop.export import Exported, context_of, weights_of
from hybridlm.interop.gguf import run as script
from hybridlm.interop.gguf.architectures import TARGETS, Target
from hybridlm.interop.gguf.tensors import links
from hybridlm.interop.gguf.vocabulary import Vocabulary, differing, vocabulary
from hybridlm.interop.links import exported
from hybridlm.interop.reach import nearest
from hybridlm.interop.reference import TOLERANCE, Agreement, write_reference
from hybridlm.interop.writing import new_file
from hybridlm.runs.checkpoint import LoadedRun
from hybridlm.runs.resume import recorded

_READ = 500_000  # tokens of text in which differences are counted
_SECONDS = 1800


def export_gguf(run: LoadedRun, target: Path, *, arch: str | None = None, dtype: str | None = None) -> Exported:
    """Writes the file ``target``. dtype: of ``DTYPES``; default: as trained. UserError: llama.cpp has no such model or
    tokenizer, the package ``gguf`` is missing, or ``target`` is there already. RunFailed: the file does not hold what
    it should, or llama.cpp, where it is installed, computes something else; nothing is left behind."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--to gguf needs the package gguf: pip install 'hybridlm[export]'")
    from hybridlm.interop.gguf.file import types_of, write

    model, target_arch = run.model, choose(run.model.config, arch)
    trained = {"torch.bfloat16": "bf16", "torch.float16": "f16"}
    dtype = dtype or trained.get(str(model.embedding.weight.dtype), "f32")
    words = vocabulary(run.tokenizer, model.vocab_size, chat=run.folder.chat_template.is_file())
    keys = {"general.type": "model", "general.name": model.config.name}
    keys |= target_arch.all_keys(model.config, model.vocab_size, context_of(run)) | words.keys
    tensors = exported(links(model.config, target_arch), weights_of(model))
    notes = list(_tokenizer_notes(run, words))
    agreement, name = None, target_arch.file_name(model.config)
    with new_file(target) as path:
        write(path, name, keys, tensors, dtype)
        if importlib.util.find_spec("llama_cpp") is not None:
            exact = path if dtype == "f32" else path.with_name("exact")
            if exact != path:
                write(exact, name, keys, tensors, "f32")
            agreement = _check(path, run, exact, words)
    kept = [one for one, kind in types_of(tensors, dtype).items() if dtype == "q8_0" and kind.name == "F16"]
    if kept:
        notes.append(f"in f16, as their rows are no multiple of 32: {', '.join(kept[:3])}" + ", ..." * (len(kept) > 3))
    if agreement is None:
        notes.append("llama-cpp-python is not installed: the file was read back and compared, but not run")
    return Exported(target, f"{name}, {dtype}", ("llama.cpp",), agreement, tuple(notes))


def choose(model: ModelConfig, name: str | None = None) -> Target:
    """The first architecture of llama.cpp that represents ``model`` exactly, or the one called ``name``. UserError:
    there is none; one line for each constraint of the nearest, with the override that lifts it."""
    candidates = [one for one in TARGETS if name in (None, one.name)]
    if not candidates:
        raise UserError(f"--arch {name}: expected one of {', '.join(one.name for one in TARGETS)}")
    target, needs = nearest(model, candidates)
    if needs:
        refusal = f"no architecture of llama.cpp computes what this model does; nearest: {target.name}"
        raise UserError([refusal, *(need.line() for need in needs)])
    return target


def _tokenizer_notes(run: LoadedRun, words: Vocabulary) -> Iterator[str]:
    if not run.tokenizer.lossless:
        yield "the tokenizer normalises text to Unicode NFC, and llama.cpp does not: give it text in NFC"
    if words.exact:
        return
    which = "of the run's validation text"
    try:
        text = held_out_text(recorded(run.folder, rules=False).data, run.tokenizer, _READ)
    except UserError:  # a configuration or files that cannot be read
        text = []
    if not text:
        text, which = list(pydoc_data.topics.topics.values()), "of Python's documentation (no validation text is left)"
    different, total = differing(run.tokenizer, text)
    yield (
        f"llama.cpp cuts text by Llama 3's pattern, not by this tokenizer's: {different:,} of {total:,} tokens {which}"
        f" differ ({different / max(total, 1):.3%}); none do with a tokenizer trained with data.tokenizer.split=llama3"
    )


def _check(path: Path, run: LoadedRun, exact: Path, words: Vocabulary) -> Agreement:
    """Loads the file in llama.cpp, in a process of its own, and compares. exact: the same in f32. What rounding does is
    not judged: it may choose other experts."""
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch, "reference.safetensors")
        write_reference(reference, run.model.float(), run.tokenizer)
        report = run_llama_cpp(exact, reference)
        if not (report["logits"] <= TOLERANCE and report["decode"] <= 10 * TOLERANCE):
            worst = max(report["logits"], report["decode"])
            raise RunFailed(f"llama.cpp computes something else: logits differ by {worst:.1e}")
        if words.exact and not all(report["texts"]):
            raise RunFailed("llama.cpp gives a text other tokens")
        if path != exact:
            report = run_llama_cpp(path, reference)
    return Agreement(report["logits"], report["decode"], tuple(report["greedy"]))


def run_llama_cpp(path: Path, reference: Path) -> dict[str, Any]:
    """The report of ``run.py``. RunFailed: llama.cpp does not load the file."""
    command = [sys.executable, "-P", str(Path(script.__file__)), str(path), str(reference)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RunFailed(f"llama.cpp does not load the file: {reason[:300]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report

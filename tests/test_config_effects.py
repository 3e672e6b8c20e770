"""Every field of the configuration is read: flipping it alone changes something that can be observed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from hybridlm.cli.compose import compose_config
from hybridlm.config.load import load_config
from hybridlm.config.run import RunConfig
from hybridlm.data.preparing import prepare as prepare_module
from hybridlm.data.preparing.prepare import prepare
from hybridlm.errors import UserError
from hybridlm.eval.probes import text_probe_metrics
from hybridlm.machine.description import resolve_machine
from hybridlm.machine.kernels import choose_kernels
from hybridlm.machine.profiles import planned_device, planned_rates
from hybridlm.model.build import build_model, fresh_model
from hybridlm.optim.optimizer import HybridOptimizer, model_groups, param_groups
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.matching import matched
from hybridlm.train import run as run_module
from hybridlm.train.callbacks import extra_callbacks, metering_callbacks, sampled
from hybridlm.train.checkpoints import AtomicCheckpointIO, Checkpoints
from hybridlm.train.console import Console
from hybridlm.train.guards import GuardCallback, RunDiverged
from hybridlm.train.launch import strategy
from hybridlm.train.loggers import Remote, make_loggers
from hybridlm.train.metrics import Clock
from hybridlm.train.objective import objective_of
from hybridlm.train.router import routers_of
from hybridlm.train.schedule import lr_factor
from hybridlm.train.stopping import Stopping
from hybridlm.train.trainer import make_trainer
from hybridlm.train.validation import InContextProbes

# field: (new value, what else has to be set for the field to matter)
FROM_FILE = ["data.tokenizer.kind=file", "data.tokenizer.path=CORPUS/tokenizer.json"]
FROM_HUB = ["data.source=hf", "data.path=null", "data.hf.id=CORPUS/hub"]
PAIRS = ["data.path=CORPUS/chats.jsonl", "data.format=preferences", "optim.objective=dpo"]
CHAT_TOKENS = "['<|system|>', '<|user|>', '<|assistant|>', '<|end|>']"
FLIPS: dict[str, tuple[Any, list[str]]] = {
    "seed": (1, []),
    "model.sizes": ("[small]", []),
    "model.d_model": (64, []),
    "model.n_layers": (3, []),
    "model.pattern": ("T", []),
    "model.ssm": ("mamba3", []),
    "model.variants": ("{M: {mixer: attention}}", []),
    "model.ffn_after.attention": ("none", []),
    "model.ffn_after.mamba1": ("moe", ["model.pattern=M1"]),
    "model.ffn_after.mamba2": ("none", ["model.ffn_after.mamba2=mlp"]),
    "model.ffn_after.mamba3": ("moe", ["model.pattern=M3"]),
    "model.ffn_after.mla": ("moe", ["model.pattern=L"]),
    "model.ffn_after.gdn": ("moe", ["model.pattern=G", "model.gdn.n_v_heads=1"]),
    "model.ffn_after.kda": ("moe", ["model.pattern=K", "model.kda.n_v_heads=1"]),
    "model.attention.n_heads": (4, []),
    "model.attention.n_kv_heads": (1, []),
    "model.attention.head_dim": (8, []),
    "model.attention.rope": ("true", []),
    "model.attention.rope_theta": (50.0, ["model.attention.rope=true"]),
    "model.attention.rope_fraction": (0.5, ["model.attention.rope=true"]),
    "model.attention.gate": ("true", []),
    "model.attention.qk_norm": ("true", []),
    "model.attention.window": (3, []),
    "model.attention.scale": (0.5, []),
    **{
        f"model.mamba1.{name}": (value, ["model.pattern=M1", "model.mamba1.chunk=4"])
        for name, value in {
            "d_state": 4,
            "d_conv": 3,
            "expand": 4,
            "dt_rank": 5,
            "bias": "true",
            "chunk": 8,
            "dt_range": "[0.01,0.02]",
        }.items()
    },
    "model.mamba2.d_state": (16, []),
    "model.mamba2.d_conv": (3, []),
    "model.mamba2.expand": (4, []),
    "model.mamba2.head_dim": (32, []),
    "model.mamba2.n_heads": (2, []),
    "model.mamba2.n_groups": (2, []),
    "model.mamba2.chunk": (8, []),
    "model.mamba2.dt_range": ("[0.01,0.02]", []),
    "model.mamba2.dt_limit": ("[0.0,0.01]", []),
    "model.mamba2.a_range": ("[1.0,2.0]", []),
    "model.mamba2.norm_before_gate": ("true", []),
    **{
        f"model.mamba3.{name}": (
            value,
            ["model.pattern=M3", "model.mamba3.head_dim=16", "model.mamba3.d_state=8", *needs],
        )
        for name, (value, needs) in {
            "d_state": (16, []),
            "expand": (4, []),
            "head_dim": (32, []),
            "n_heads": (2, []),
            "n_groups": (2, []),
            "mimo_rank": (2, []),
            "chunk": (4, []),
            "complex_rope": ("false", []),
            "rope_fraction": (1.0, []),
            "trapezoidal": ("false", []),
            "use_conv": ("true", []),
            "d_conv": (3, ["model.mamba3.use_conv=true"]),
            "a_activation": ("heavy_tail", []),
            "a_floor": (2.0, []),
            "outproj_norm": ("true", []),
            "dt_range": ("[0.01,0.02]", []),
        }.items()
    },
    **{
        f"model.mla.{name}": (value, ["model.pattern=L", *needs])
        for name, (value, needs) in {
            "n_heads": (2, []),
            "kv_lora_rank": (8, []),
            "q_lora_rank": (8, []),
            "qk_nope_head_dim": (8, []),
            "qk_rope_head_dim": (8, []),
            "v_head_dim": (8, []),
            "rope": ("false", []),
            "rope_theta": (50.0, []),
            "rope_interleave": ("false", []),
            "scale": (0.5, []),
        }.items()
    },
    **{
        f"model.{kind}.{name}": (
            value,
            [f"model.pattern={letter}", f"model.{kind}.head_k_dim=16", f"model.{kind}.n_v_heads=2"],
        )
        for kind, letter, own in (
            ("gdn", "G", {"use_gate": "false"}),
            ("kda", "K", {"gate_bias": "true", "lower_bound": -5.0}),
        )
        for name, value in {
            "head_k_dim": 8,
            "head_v_dim": 8,
            "n_v_heads": 4,
            "n_k_heads": 1,
            "use_conv": "false",
            "d_conv": 3,
            "allow_neg_eigval": "true",
            "chunk": 8,
            "dt_range": "[0.01,0.02]",
            "a_range": "[1.0,2.0]",
            **own,
        }.items()
    },
    **{
        f"model.moe.{name}": (value, ["model.pattern=T:moe", "model.moe.d_expert=16", *needs])
        for name, (value, needs) in {
            "n_experts": (4, []),
            "top_k": (1, []),
            "d_expert": (32, []),
            "expand": (3.0, ["model.moe.d_expert=null"]),
            "multiple_of": (96, ["model.moe.d_expert=null"]),
            "n_shared_experts": (1, []),
            "d_shared": (24, ["model.moe.n_shared_experts=1"]),
            "shared_gate": ("true", ["model.moe.n_shared_experts=1"]),
            "activation": ("relu2", []),
            "router": ("sigmoid", []),
            "norm_topk_prob": ("false", []),
            "routed_scaling_factor": (2.0, []),
            "n_expert_groups": (2, ["model.moe.router=sigmoid"]),
            "topk_groups": (1, ["model.moe.router=sigmoid", "model.moe.n_expert_groups=4", "model.moe.topk_groups=4"]),
            "balance_loss_weight": (0.5, []),
            "z_loss_weight": (0.5, []),
            "bias_update_rate": (0.5, ["model.moe.router=sigmoid"]),
        }.items()
    },
    "model.mlp.d_ff": (64, []),
    "model.mlp.expand": (4.0, ["model.mlp.d_ff=null"]),
    "model.mlp.multiple_of": (80, ["model.mlp.d_ff=null"]),
    "model.mlp.activation": ("relu2", []),
    "model.init.std": (0.5, []),
    "model.init.embedding_std": (0.5, []),
    "model.init.head_std": (0.5, ["model.tie_embeddings=false"]),
    "model.init.residual": ("zero", ["model.init.residual=none"]),
    "model.vocab_size": (300, []),
    "model.vocab_multiple": (100, []),
    "model.tie_embeddings": ("false", []),
    "model.norm_eps": (0.1, []),
    "model.embedding_scale": (2.0, []),
    "model.residual_scale": (0.5, []),
    "model.logit_scale": (2.0, []),
    "model.logit_softcap": (3.0, []),
    "size.name": ("d12", ["model.sizes=[default]"]),
    "data.source": ("stdlib", []),
    "data.path": ("nowhere/*.txt", []),
    "data.val_path": ("CORPUS/19.txt", []),
    "data.dtype": ("u16", ["data.source=bins", "data.path=CORPUS/ids.bin", *FROM_FILE]),
    "data.text_field": ("body", ["data.path=CORPUS/lines.jsonl"]),
    "data.on_bad": ("fail", ["data.path=CORPUS/lines.jsonl"]),
    "data.dedup": ("true", ["data.path=CORPUS/lines.jsonl"]),
    "data.format": (
        "text",
        [
            "data.path=CORPUS/chats.jsonl",
            "data.text_field=prompt",
            "data.format=chat",
            f"data.tokenizer.special_tokens={CHAT_TOKENS}",
        ],
    ),
    "data.hf.id": ("nowhere/at/all", FROM_HUB),
    "data.hf.name": ("other", FROM_HUB),
    "data.hf.split": ("test", FROM_HUB),
    "data.hf.revision": ("v1", FROM_HUB),
    "data.hf.streaming": ("true", FROM_HUB),
    "data.hf.limit_mb": (1, FROM_HUB),
    "data.parts": (
        "{a: {source: files, path: 'CORPUS/lines.jsonl', weight: 7.0}, b: {source: files, path: 'CORPUS/*.txt'}}",
        [
            "data.source=mixture",
            "data.path=null",
            "data.parts={a: {source: files, path: 'CORPUS/lines.jsonl'}, b: {source: files, path: 'CORPUS/*.txt'}}",
        ],
    ),
    **{
        f"data.synthetic.{name}": (value, ["data.source=synthetic", "data.path=null", "data.val_seq_len=null", *needs])
        for name, (value, needs) in {
            "task": ("induction", []),
            "vocab_size": (32, []),
            "n_pairs": (3, []),
            "n_items": (3, ["data.synthetic.task=selective_copying"]),
            "modulus": (7, ["data.synthetic.task=modular_arithmetic"]),
            "min_length": (20, []),
            "eval_lengths": ("[40]", []),
            "examples": (70, []),
            "val_examples": (70, []),
            "seed": (1, []),
        }.items()
    },
    "data.shard_mb": (1, []),
    "data.prepare_workers": (7, []),
    "data.workers": (1, []),
    "data.tokenizer.special_tokens": ("['<|x|>']", []),
    "data.tokenizer.train_mb": (
        1,
        ["data.path=CORPUS/long.jsonl", "data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=300"],
    ),
    "data.packing": ("true", []),
    "data.isolate": ("false", ["data.packing=true"]),
    "data.out": ("OTHER", []),
    "data.tokenizer.kind": ("bpe", []),
    "data.tokenizer.path": ("nowhere.json", FROM_FILE),
    "data.tokenizer.vocab_size": (300, ["data.tokenizer.kind=bpe"]),
    "data.tokenizer.split": ("llama3", ["data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=300"]),
    "data.val_fraction": (0.5, []),
    "data.seq_len": (16, []),
    "data.val_seq_len": (32, []),
    "data.global_batch": (8, []),
    "data.batch_size": (2, []),
    "optim.name": ("muon", ["optim.name=adamw"]),
    "optim.objective": ("next_token", PAIRS),
    "optim.dpo_beta": (0.5, PAIRS),
    "optim.lr": (0.5, []),
    "optim.lr_scale.matrix": (0.5, []),
    "optim.lr_scale.vector": (0.5, []),
    "optim.lr_scale.embedding": (0.5, []),
    "optim.lr_scale.head": (0.5, ["model.tie_embeddings=false"]),
    "optim.betas": ("[0.5,0.5]", []),
    "optim.eps": (0.1, []),
    "optim.weight_decay": (0.7, []),
    "optim.clip": (0.001, []),
    "optim.muon.lr": (0.5, ["optim.name=muon"]),
    "optim.muon.momentum": (0.1, ["optim.name=muon"]),
    "optim.muon.ns_steps": (1, ["optim.name=muon"]),
    "optim.sgd.momentum": (0.1, ["optim.name=sgd"]),
    "optim.sgd.nesterov": ("true", ["optim.name=sgd"]),
    "optim.schedule": ("constant", []),
    "optim.warmup": (7, []),
    "optim.decay": (5, ["optim.schedule=wsd"]),
    "optim.final_lr": (0.5, []),
    "trainer.max_steps": (13, []),
    "trainer.log_every": (3, []),
    "trainer.val_every": (6, []),
    "trainer.val_batches": (1, []),
    "trainer.ckpt_every": (6, []),
    "trainer.keep_last": (3, []),
    "trainer.keep_best": (2, []),
    "trainer.async_checkpoints": ("true", []),
    "trainer.time_limit": ("'1:30:00'", []),
    "trainer.requeue": ("true", []),
    "trainer.accumulate": (2, []),
    "trainer.checkpoint_blocks": (1, []),
    "trainer.loss_rows": (64, []),
    "trainer.compile": ("true", []),
    "trainer.precision": ("bf16-mixed", []),
    "trainer.guard.rollback_after": (2, []),
    "trainer.guard.lr_factor": (0.25, []),
    "trainer.guard.max_rollbacks": (1, []),
    "trainer.guard.spike_sigma": (3.0, ["trainer.guard.spike_window=2"]),
    "trainer.guard.spike_window": (3, ["trainer.guard.spike_sigma=3.0", "trainer.guard.spike_window=2"]),
    "trainer.devices": (2, []),
    "trainer.strategy": ("fsdp2", ["trainer.devices=2", "optim.name=adamw"]),
    "trainer.headless": ("true", []),
    "trainer.threads": (2, []),
    "logger.name": ("wandb", []),
    "logger.project": ("another", ["logger.name=wandb"]),
    **{
        f"logger.{name}": (value, ["logger.name=wandb"])
        for name, value in {
            "entity": "team",
            "group": "g",
            "job_type": "j",
            "tags": "[t]",
            "run_name": "r",
            "offline": "false",
            "timeout": 7.0,
        }.items()
    },
    "callbacks.samples.prompts": ("[another]", []),
    "callbacks.samples.tokens": (5, []),
    "callbacks.samples.temperature": (0.0, []),
    "callbacks.samples.top_p": (0.05, []),
    "callbacks.samples.every": (2, []),
    "callbacks.ema.decay": (0.9, []),
    "callbacks.probes.every": (2, []),
    "callbacks.probes.examples": (5, ["callbacks.probes.every=2"]),
    "callbacks.probes.length": (64, ["callbacks.probes.every=2"]),
    "callbacks.early_stop.patience": (3, []),
    "callbacks.early_stop.min_delta": (0.5, ["callbacks.early_stop.patience=3"]),
    "hardware.name": ("another", ["hardware.accelerator=cuda"]),
    "hardware.accelerator": ("cuda", []),
    "hardware.cards": ("[another]", ["hardware.accelerator=cuda"]),
    "hardware.memory_gb": (2.0, ["hardware.accelerator=auto"]),
    "hardware.compute_capability": ("9.9", ["hardware.accelerator=auto"]),
    "hardware.shared_memory_kb": (17, ["hardware.accelerator=auto"]),
    "hardware.peak_tflops.fp32": (1.5, ["hardware.accelerator=auto", "trainer.precision=32-true"]),
    "hardware.peak_tflops.tf32": (1.5, ["hardware.accelerator=auto"]),
    "hardware.peak_tflops.fp16": (1.5, ["hardware.accelerator=auto", "trainer.precision=16-mixed"]),
    "hardware.peak_tflops.bf16": (1.5, ["hardware.accelerator=auto"]),
    "hardware.bandwidth_gb_s": (100.0, ["hardware.accelerator=auto"]),
    "hardware.source": ("hearsay", ["hardware.accelerator=auto", "hardware.peak_tflops.bf16=1.5"]),
    "hardware.bf16": ("false", ["hardware.accelerator=auto"]),
    "hardware.cpu.global_batch": (32, ["data.global_batch=auto"]),
    "hardware.cpu.max_steps": (77, ["trainer.max_steps=auto"]),
    "hardware.cuda.global_batch": (128, ["data.global_batch=auto", "hardware.accelerator=auto"]),
    "hardware.cuda.max_steps": (99, ["trainer.max_steps=auto", "hardware.accelerator=auto"]),
    "sweep.match": ("params", []),
    "sweep.reference": ("M", ["sweep.match=params"]),
    "sweep.target": (20_000, ["sweep.match=params"]),
    "sweep.matched": ("done", ["sweep.match=params"]),
    # On a CPU no kernel can be had: the one that is asked for is named in the refusal.
    "kernels.default": ("cuda", []),
    "kernels.conv": ("cuda", []),
    "kernels.mamba1": ("cuda", ["model.pattern=M1"]),
    "kernels.mamba2": ("cuda", []),
    "kernels.mamba3": ("cuda", ["model.pattern=M3"]),
    "kernels.loss": ("cuda", []),
}
# Fields that change nothing a run computes, each with the reason; at most five.
INERT = {
    "model.name": "a label: it stands in summary.json (tests/test_end_to_end.py reads it there)",
    "ckpt": "read by hybridlm/runs/resume.py before the run begins (tests/config and tests/test_end_to_end.py)",
    "init_from": "replaces the weights of the start (tests/train/test_initial.py)",
    "data.changed": "whether a run goes on with other text at all (tests/cli/test_jobs.py)",
}


def leaves(model: type[BaseModel], path: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        here = f"{path}.{name}" if path else name
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        found += leaves(field.annotation, here) if nested else [here]
    return found


def test_every_field_is_listed_once():
    assert len(INERT) <= 5
    assert set(FLIPS) | set(INERT) == set(leaves(RunConfig))
    assert not set(FLIPS) & set(INERT)


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()[
        :16
    ]


def model_effects(config: RunConfig) -> dict[str, Any]:
    model = fresh_model(config.model, 257, seed=config.seed, device="cpu")
    ids = torch.arange(24).view(2, 12) * 7 % 257
    with torch.no_grad():
        logits = model(ids).logits
        cache = model.new_cache(2, 12)
        model(ids, cache=cache)
    groups = param_groups(model.named_parameters(), model.param_specs(), config.optim)
    before = digest(*model.parameters())
    optimizer = HybridOptimizer(groups, config.optim)
    for _ in range(2):
        output = model(ids, targets=ids.roll(-1, 1))
        (output.loss_sum / 24 + (0 if output.aux is None else output.aux)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, ffn in routers_of(model).items():
        ffn.balance(output.router[layer].counts)
    return {
        "buffers": digest(*model.buffers()),
        "shapes": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "weights": before,
        "logits": digest(logits),
        "cache": cache.bytes,
        "groups": [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in groups],
        "updated": digest(*model.parameters()),
        "objective": objective_of(config.optim),
        "rates": [lr_factor(step, config.optim, 12) for step in range(12)],
    }


def data_effects(config: RunConfig) -> dict[str, Any]:
    if config.data.path and config.data.source == "stdlib":
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": "files"})})
    prepared = prepare(config.data)
    machine = resolve_machine(config)
    module = run_module._datamodule(config, machine, prepared, val_batches=config.trainer.val_batches)
    module.trainer = types.SimpleNamespace(global_rank=0, world_size=machine.devices)  # type: ignore[assignment]
    train, val = module.train_dataloader(), module.val_dataloader()
    batch = next(iter(train))
    epoch = len(train)
    loaders = val if isinstance(val, list) else [val]
    return {
        "folders": [str(part.folder) for part in prepared.parts],
        "workers": (prepare_module._workers(config.data), train._workers),
        "batch": (digest(batch["ids"]), tuple(batch["ids"].shape), int(batch["n_targets"]), sorted(batch)),
        "epoch": epoch,
        "val": [(len(loader), tuple(next(iter(loader))["ids"].shape)) for loader in loaders],
    }


def loop_effects(config: RunConfig, tmp_path: Path) -> dict[str, Any]:
    machine = resolve_machine(config)
    folder = RunFolder(tmp_path)
    saver = Checkpoints(folder, config.trainer, Stopping(config.trainer, 0.0, print), print)
    trainer = make_trainer(config, machine, folder, [], [saver])
    torch.set_num_threads(config.trainer.threads or 1)
    console = Console(config.trainer.headless, machine.max_steps)
    loggers, remote = make_loggers(config, folder, console, resumed_at=None, sweep=None)
    prepared = prepare(config.data)
    plan: Any = types.SimpleNamespace(  # numbers by now
        checkpoint_blocks=config.trainer.checkpoint_blocks, loss_rows=config.trainer.loss_rows
    )
    module = run_module._module(config, machine, prepared, {}, plan)
    _, metrics = metering_callbacks(config, machine, module.model, prepared.tokenizer, console, Clock())
    torch.set_num_threads(1)
    return {
        "machine": machine,
        "trainer": (
            trainer.max_steps,
            trainer.val_check_interval,
            trainer.accumulate_grad_batches,
            trainer.precision,
            type(trainer.strategy).__name__,
        ),
        "recomputed": (module.model.checkpoint_blocks, module.model.loss_rows),
        "compiled": [block._compiled_call_impl is not None for block in module.model.blocks],
        "checkpoints": (saver.every, saver.keep_last, saver.keep_best, type(trainer.strategy.checkpoint_io)),
        "stopping": (saver.stopping._limit, saver.stopping._requeue),
        "strategy": str(type(strategy(config.trainer.strategy, machine))),
        "loggers": [type(logger).__name__ for logger in loggers],
        "remote": remote._backend and (remote._backend.arguments | {"config": None}, remote._backend._timeout),
        "json": console._json,
        "log_every": metrics._log_every,
        "guard": guard_effects(config, folder),
        **callback_effects(config, folder, remote),
    }


def guard_effects(config: RunConfig, folder: RunFolder) -> list[str]:
    """What the guard says of four good steps, a high loss and twelve bad ones, called as Lightning would."""
    said: list[str] = []
    model = fresh_model(config.model, 257, seed=0, device="cpu")
    optimizer = HybridOptimizer(model_groups(model, config.optim), config.optim)
    strategy = types.SimpleNamespace(
        broadcast=lambda value: value, reduce=lambda value, reduce_op: value, checkpoint_io=AtomicCheckpointIO()
    )
    precision = types.SimpleNamespace(train_step_context=contextlib.nullcontext)
    trainer: Any = types.SimpleNamespace(
        global_step=0, is_global_zero=True, optimizers=[optimizer], strategy=strategy, precision_plugin=precision
    )
    module: Any = types.SimpleNamespace(model=model)
    guard = GuardCallback(config.trainer.guard, folder, ckpt_every=1, say=said.append)
    guard.on_train_start(trainer, module)
    batch = {"ids": torch.zeros(1, 2, dtype=torch.int64), "targets": torch.zeros(1, 2, dtype=torch.int64)}
    try:
        for loss in [2.0, 1.0, 2.0, 1.0, 9.0, *[float("nan")] * 12]:
            guard.on_train_batch_start(trainer, module, batch, 0)
            guard.on_before_backward(trainer, module, torch.tensor(loss))
            model.norm.weight.grad = torch.full_like(model.norm.weight, loss)
            optimizer.step()
            trainer.global_step += 1
            guard.on_train_batch_end(trainer, module, None, batch, 0)
    except RunDiverged as error:
        said.append(str(error))
    return said


def callback_effects(config: RunConfig, folder: RunFolder, remote: Remote) -> dict[str, Any]:
    names = ("_decay", "_interval", "patience", "min_delta")
    tokenizer = prepare(config.data).tokenizer
    callbacks = extra_callbacks(config, folder, tokenizer, remote, print)
    found = {
        "callbacks": [
            (type(callback).__name__, [getattr(callback, name, None) for name in names]) for callback in callbacks
        ]
    }
    for probes in (callback for callback in callbacks if isinstance(callback, InContextProbes)):
        model = fresh_model(config.model, tokenizer.vocab_size, seed=0, device="cpu")
        found |= {
            "probes": text_probe_metrics(
                model, tokenizer, examples=probes._config.examples, length=probes._config.length
            )
        }
    return found


def sample_effects(config: RunConfig) -> dict[str, Any]:
    prepared = prepare(config.data)
    model = fresh_model(config.model, prepared.tokenizer.vocab_size, seed=config.seed, device="cpu")
    return {"samples": sampled(model, prepared.tokenizer, config.callbacks.samples, config.seed)}


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A CUDA device as far as ``hardware.py`` looks at it; returns what it asked the device for."""
    asked: dict[str, Any] = {}
    fake = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda: "pretended",
        "get_device_properties": lambda index: types.SimpleNamespace(
            total_memory=16 * 2**30, major=8, minor=6, shared_memory_per_block_optin=99 * 1024
        ),
        "set_per_process_memory_fraction": lambda fraction: asked.update(fraction=fraction),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr("hybridlm.machine.description.matrix_tflops", lambda device, name: 3.0)
    return asked


def observe(section: str, config: RunConfig, tmp_path: Path) -> dict[str, Any]:
    match section:
        case "model" | "optim":
            return model_effects(config)
        case "kernels":
            return {"kernels": choose_kernels(config, resolve_machine(config), print)}
        case "data":
            return data_effects(config)
        case "seed":
            return {**model_effects(config), **data_effects(config), **sample_effects(config)}
        case "callbacks":
            folder = RunFolder(tmp_path)
            _, remote = make_loggers(config, folder, Console(True, 1), resumed_at=None, sweep=None)
            return {**sample_effects(config), **callback_effects(config, folder, remote)}
        case "sweep":
            return {"model": matched(config).config.model}
        case _:
            return {**loop_effects(config, tmp_path), **data_effects(config)}


def attempt(observed: Any) -> Any:
    """What is observed, or the refusal: both are effects."""
    try:
        return observed()
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def tree(tiny) -> dict[str, Any]:
    return compose_config(tiny).model_dump()


def configured(tree: dict[str, Any], *settings: str) -> RunConfig:
    """The tree with ``path=YAML value`` set on top, validated."""
    changed = copy.deepcopy(tree)
    for setting in settings:
        path, value = setting.split("=", 1)
        *sections, name = path.split(".")
        place = changed
        for section in sections:
            place = place[section]
        place[name] = yaml.safe_load(value)
    return load_config(changed)


@pytest.mark.parametrize("section", ["seed", "model", "data", "optim", "trainer", "callbacks"])
def test_without_a_flip_nothing_changes(section, tree, tmp_path):
    """The control of the tests below: what they observe does not differ from call to call."""
    assert observe(section, configured(tree), tmp_path) == observe(section, configured(tree), tmp_path)


@pytest.fixture(scope="module")
def observed(tree, tmp_path_factory):
    """``observed(section, *settings)``, once each: many fields are flipped in the same context. In one folder, whose
    path is part of what is observed."""
    folder = tmp_path_factory.mktemp("observed")
    return cache(lambda section, *settings: attempt(lambda: observe(section, configured(tree, *settings), folder)))


@pytest.mark.parametrize("field", [field for field in FLIPS if not field.startswith("hardware.")])
def test_flipping_a_field_has_an_effect(field, observed, tmp_path, corpus):
    value, context = FLIPS[field]
    context = [setting.replace("CORPUS", str(corpus)) for setting in context]
    value = tmp_path / "other" if field == "data.out" else str(value).replace("CORPUS", str(corpus))
    section = field.split(".")[0]
    assert observed(section, *context) != observed(section, *context, f"{field}={value}")


def hardware_effects(config: RunConfig) -> tuple[Any, ...]:
    """What a run here would take, and what a plan for the profile's card reads."""
    return resolve_machine(config), planned_device(config.hardware), planned_rates(config.hardware)


@pytest.mark.parametrize("field", [field for field in FLIPS if field.startswith("hardware.")])
def test_flipping_a_hardware_field_has_an_effect(field, tree, request):
    value, context = FLIPS[field]
    gpu = field not in ("hardware.name", "hardware.accelerator", "hardware.cpu.global_batch", "hardware.cpu.max_steps")
    asked = request.getfixturevalue("pretend_gpu") if gpu else {}
    before = attempt(lambda: (hardware_effects(configured(tree, *context)), dict(asked)))
    asked.clear()
    after = attempt(lambda: (hardware_effects(configured(tree, *context, f"{field}={value}")), dict(asked)))
    assert before != after


def test_a_built_model_agrees_with_its_meta_twin(tree):
    config = configured(tree)
    meta = build_model(config.model, 257)
    real = fresh_model(config.model, 257, seed=0, device="cpu")
    assert {name: tensor.shape for name, tensor in meta.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }

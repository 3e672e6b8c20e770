"""One training run from a validated configuration to its summary."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only

from hybridlm.checkpoint import KEY, load_run, read_checkpoint
from hybridlm.config.load import to_yaml
from hybridlm.config.section import ConfigError
from hybridlm.data.chat import template_of
from hybridlm.data.corpus import Prepared
from hybridlm.data.datamodule import DataModule
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.windows.splits import packed_documents
from hybridlm.hardware import CPU, Machine, resolve_machine
from hybridlm.model.build import build_model, fresh_model
from hybridlm.model.count import flops_per_token, layer_table, parameters
from hybridlm.train.console import Console
from hybridlm.train.launch import relaunchable
from hybridlm.train.lightning_module import LitLM
from hybridlm.train.metrics import MetricsCallback, RunFiles
from hybridlm.train.router import RouterCallback, moe_layers
from hybridlm.train.samples import write_samples
from hybridlm.train.trainer import make_trainer, quiet_lightning

if TYPE_CHECKING:
    import lightning
    from lightning.pytorch.loggers.logger import Logger

    from hybridlm.config.run import RunConfig
    from hybridlm.config.train import TrainerConfig
    from hybridlm.run_folder import RunFolder


def run(config: RunConfig, folder: RunFolder, resume: Path | None, verb: Sequence[str] = ()) -> dict[str, Any]:
    """Trains, validates, samples; returns what summary.json holds. ConfigError: anything the user can mend.

    resume: a checkpoint of ``folder`` to go on from; verb: the words between the program's name and the overrides.
    """
    began = time.perf_counter()
    quiet_lightning()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    machine = resolve_machine(config)
    console = Console(config.trainer.headless, machine.max_steps)
    console.say(
        f"run folder  {folder.path}\nmachine     {machine.device_name}, {machine.devices} process(es), precision {machine.precision}"
    )
    resumed = None if resume is None else _resumable(resume, machine)
    prepared = prepare(config.data, report=lambda line: console.say(f"data        {line}"))
    if resumed is not None and resumed.tokenizer != prepared.tokenizer.fingerprint:
        raise ConfigError(f"{resume}: trained with another tokenizer than today's data gives; has the text or data.tokenizer changed?")
    if config.data.packing:
        packed = packed_documents(prepared, config.data.seq_len)
        console.say(f"data        whole documents packed into {packed.windows:,} windows, {packed.efficiency:.1%} full")
    _begin_folder(config, folder, prepared, resuming=resume is not None)

    module = _module(config, machine, prepared)
    table = layer_table(build_model(config.model, prepared.tokenizer.vocab_size), config.data.seq_len)
    _write(folder.layers, table + "\n")
    tokens_per_step = machine.global_batch * config.data.seq_len
    console.say(
        f"\n{table}\n\n{machine.max_steps} steps of {machine.global_batch} x {config.data.seq_len} tokens"
        f" ({machine.batch_size} x {machine.accumulate} x {machine.devices} windows)"
        + (f", resuming after step {resumed.step}" if resumed else "")
    )
    routers, metrics = _callbacks(config.trainer.log_every, module, console, tokens_per_step)
    loggers = _loggers(config, folder, console, resumed.step if resumed else None)
    trainer = make_trainer(config, machine, folder, loggers, [*routers, metrics])
    with relaunchable(verb), _ending(console, trainer, verb):
        data = _datamodule(config, machine, prepared, val_batches=config.trainer.val_batches)
        trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume), weights_only=True)
        _save_final(trainer, folder, config.trainer)
        console.say("validating on all held-out text ...")
        trainer.validate(module, datamodule=_datamodule(config, machine, prepared, val_batches=None), verbose=False)
        final = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    if rank_zero_only.rank != 0:
        return {}
    summary = _summary(config, machine, prepared, final, metrics, began, folder)
    write_samples(load_run(str(folder.path), torch.device(machine.device)), config.callbacks.samples, config.seed, folder.samples, console)
    _write(folder.summary, json.dumps(summary, indent=2) + "\n")
    _report(console, summary, verb)
    return summary


class _Resumed(NamedTuple):
    """Where a checkpoint stands, and the fingerprint of the tokenizer it was trained with."""

    step: int
    tokenizer: str


def _resumable(resume: Path, machine: Machine) -> _Resumed:
    """What this run goes on from. ConfigError: it is past the end, or its steps were cut in another way."""
    content = read_checkpoint(resume)
    step, accumulate = int(content["global_step"]), content[KEY]["accumulate"]
    if accumulate != machine.accumulate:
        raise ConfigError(
            f"{resume}: its steps have {accumulate} micro-batches per device, this run's {machine.accumulate}; resume with "
            f"trainer.accumulate={accumulate} (Lightning counts its position in micro-batches)"
        )
    if step >= machine.max_steps:
        raise ConfigError(f"trainer.max_steps = {machine.max_steps}: {resume} is already at step {step}; give a larger number to go on")
    return _Resumed(step, content[KEY]["tokenizer"])


@rank_zero_only
def _begin_folder(config: RunConfig, folder: RunFolder, prepared: Prepared, *, resuming: bool) -> None:
    """Takes possession of the folder (a new run) or brings its configuration up to date (a resumed one)."""
    text = to_yaml(config)
    if resuming:
        folder.rewrite_config(text)
    else:
        folder.claim(text)
    prepared.tokenizer.save(folder.tokenizer)
    if any(part.train.stream.masked for part in prepared.parts):
        template_of(prepared.tokenizer).save(folder.path)


@rank_zero_only
def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _module(config: RunConfig, machine: Machine, prepared: Prepared) -> LitLM:
    vocab = prepared.tokenizer.vocab_size
    try:
        model = fresh_model(config.model, vocab, seed=config.seed, device=CPU)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model.checkpoint_blocks = config.trainer.checkpoint_blocks
    return LitLM(
        model,
        config.optim,
        machine,
        tokenizer_fingerprint=prepared.tokenizer.fingerprint,
        sharded=config.trainer.strategy == "fsdp2",
    )


def _callbacks(log_every: int, module: LitLM, console: Console, tokens_per_step: int) -> tuple[list[RouterCallback], MetricsCallback]:
    """The one for routers, where there are any, and the one for metrics, which asks the first."""
    layers = moe_layers(module.model)
    routers = [RouterCallback(layers, log_every, console.say)] if layers else []
    return routers, MetricsCallback(log_every, tokens_per_step=tokens_per_step, more=routers[0].metrics if routers else None)


def _datamodule(config: RunConfig, machine: Machine, prepared: Prepared, *, val_batches: int | None) -> DataModule:
    return DataModule(
        prepared,
        config.data,
        global_batch=machine.global_batch,
        micro_batch=machine.batch_size,
        accumulate=machine.accumulate,
        seed=config.seed,
        val_batches=val_batches,
    )


def _loggers(config: RunConfig, folder: RunFolder, console: Console, resumed_at: int | None) -> list[Logger]:
    if rank_zero_only.rank != 0:
        return [console]
    loggers: list[Logger] = [RunFiles(folder.metrics_jsonl, folder.metrics_csv, resume_step=resumed_at), console]
    if config.logger.name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(
            WandbLogger(
                project=config.logger.project,
                save_dir=str(folder.path),
                offline=config.logger.offline,
                log_model=False,
                config=config.model_dump(mode="json"),
            )
        )
    return loggers


@contextmanager
def _ending(console: Console, trainer: lightning.Trainer, verb: Sequence[str]) -> Iterator[None]:
    """Takes the progress bar down however training ends; an interrupted run says how to go on. (Lightning exits on Ctrl-C.)"""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        console.close()
        console.say(f"stopped at step {trainer.global_step}; go on from the last checkpoint with {_program(verb)} ckpt=last")
        raise
    finally:
        console.close()


def _program(verb: Sequence[str]) -> str:
    return f"hybridlm {' '.join(verb)}" if verb else "python train.py"


def _save_final(trainer: lightning.Trainer, folder: RunFolder, settings: TrainerConfig) -> None:
    """The state after the last step, where the interval of the step checkpoints missed it; older ones than are to be kept go.

    Lightning's callback forgets the checkpoint that a run was resumed from, and never knew this last one.
    """
    if trainer.global_step % settings.ckpt_every != 0:
        trainer.save_checkpoint(folder.step_checkpoint(trainer.global_step))
    if trainer.is_global_zero:
        for old in folder.step_checkpoints()[settings.keep_last :]:
            old.unlink()


def _summary(
    config: RunConfig,
    machine: Machine,
    prepared: Prepared,
    final: dict[str, float],
    metrics: MetricsCallback,
    began: float,
    folder: RunFolder,
) -> dict[str, Any]:
    val, val_bytes = prepared.parts[0].val, sum(part.val.text_bytes for part in prepared.parts)
    alone = len(prepared.parts) == 1  # a compressor's figure is for one text
    model = build_model(config.model, prepared.tokenizer.vocab_size)
    return {
        "run": str(folder.path),
        "model": config.model.name,
        "parameters": parameters(model),
        "train_flops_per_token": flops_per_token(model, config.data.seq_len, "train"),
        "steps": machine.max_steps,
        "tokens": machine.max_steps * machine.global_batch * config.data.seq_len,
        "val/loss": final["val/loss"],
        "val/bpb": final["val/bpb"],
        "gzip_bpb": 8 * val.gzip_bytes / val_bytes if alone and val.gzip_bytes else None,
        "xz_bpb": 8 * val.xz_bytes / val_bytes if alone and val.xz_bytes else None,
        "val_bytes": val_bytes,
        "tokens_per_s": metrics.tokens_per_s,
        "seconds": time.perf_counter() - began,
        "device": machine.device_name,
        "torch": torch.__version__,
    }


def _report(console: Console, summary: dict[str, Any], verb: Sequence[str]) -> None:
    """The last lines on the screen: how good, how fast, what next."""
    program = _program(verb)
    anchors = [(name, summary[key]) for name, key in (("gzip -9", "gzip_bpb"), ("xz -9", "xz_bpb")) if summary[key]]
    lines = [
        "",
        f"validation  {summary['val/bpb']:.4f} bits per byte on {summary['val_bytes'] / 1e3:,.0f} kB held out"
        + "".join(f"; {name} {value:.4f}" for name, value in anchors),
        f"speed       {summary['tokens_per_s']:,.0f} tokens/s, {summary['seconds']:.0f} s in all",
        "",
        "next:",
        f"  {program} ckpt=last trainer.max_steps={2 * summary['steps']}    # train on",
        "  hybridlm generate last --prompt 'def ' -n 200    # let it write",
        f"  {program} 'model.pattern=(TM)*3' optim.lr=2e-3    # try another model",
    ]
    console.say("\n".join(lines))

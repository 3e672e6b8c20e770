"""One training run from a validated configuration to its summary."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from hybridlm.config.load import to_yaml
from hybridlm.config.run import RunConfig
from hybridlm.data.chat import template_of
from hybridlm.data.corpus import Prepared
from hybridlm.data.datamodule import DataModule
from hybridlm.data.preparing.prepare import prepare
from hybridlm.data.windows.splits import packed_documents
from hybridlm.errors import RunFailed
from hybridlm.files.durable import replaced
from hybridlm.interop.reach import destinations
from hybridlm.machine.description import Machine, resolve_machine
from hybridlm.machine.device import CPU
from hybridlm.machine.kernels import choose_kernels
from hybridlm.machine.launcher import is_first_rank
from hybridlm.memory.plan import Plan, plan_inference
from hybridlm.memory.report import full_text, summary_lines
from hybridlm.model.build import fresh_model
from hybridlm.model.count import layer_table, parameters
from hybridlm.model.lm import HybridLM
from hybridlm.ops.kernels.choice import ALL_TORCH, KernelChoice
from hybridlm.optim.eight_bit import refuse_missing_kernels
from hybridlm.optim.optimizer import group_table, model_groups
from hybridlm.runs.checkpoint import facts, load_run
from hybridlm.runs.resume import Call
from hybridlm.runs.run_folder import RunFolder
from hybridlm.train.callbacks import extra_callbacks, metering_callbacks, sampled, write_samples
from hybridlm.train.checkpoints import Checkpoints
from hybridlm.train.closing import ending, hints, report
from hybridlm.train.compiled import compile_blocks, refuse_missing_compiler
from hybridlm.train.console import Console
from hybridlm.train.guards import GuardCallback
from hybridlm.train.initial import GivenWeights
from hybridlm.train.launch import ranks, strategy, sweep_name, together
from hybridlm.train.lightning_module import LitLM
from hybridlm.train.loggers import Remote, make_loggers, refuse_logger
from hybridlm.train.metrics import Clock, MetricsCallback
from hybridlm.train.reference import with_reference
from hybridlm.train.resumed import BASE, Resumed, Start, data_facts, planned
from hybridlm.train.run_files import write_or_warn
from hybridlm.train.stopping import Stopped, Stopping, signalled
from hybridlm.train.trainer import ExactSteps, make_trainer, quiet_lightning
from hybridlm.train.validation import MEASURED, task_samples


def run(
    config: RunConfig, folder: RunFolder, resume: Path | None, call: Call | None = None, start: Start | None = None
) -> dict[str, Any]:
    """Trains, validates, samples; returns the content of summary.json. UserError: anything the user can fix, found
    before anything in ``folder`` is touched.

    resume: a checkpoint of ``folder`` to resume from; start: from ``planned``, None: planned here.
    """
    call = call or Call()
    began = time.perf_counter()
    quiet_lightning()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    plan, on_meta, resumed, given = start = start or planned(config, resume)
    asked, config = config, plan.applied(config)
    machine = resolve_machine(config)
    _refuse(config, machine, folder, resumed, call)
    console = Console(config.trainer.headless, machine.max_steps)
    _say_machine(folder, machine, plan, console)
    kernels = choose_kernels(config, machine, lambda line: console.say(f"kernels     {line}"))
    prepared, read = _prepared(config, machine, start, kernels, console)
    module = _module(config, machine, prepared, read, plan, kernels, given)
    _begin_folder(asked, folder, prepared, resumed, call)
    call.meet()
    _say_model(config, machine, module.model, console, folder, start)
    clock = Clock()
    routers, metrics = metering_callbacks(config, machine, module.model, prepared.tokenizer, console, clock)
    resumed_at = None if resumed is None else resumed.step
    loggers, remote = make_loggers(config, folder, console, resumed_at=resumed_at, sweep=sweep_name())
    extra = extra_callbacks(config, folder, prepared.tokenizer, remote, console.say)
    guard = GuardCallback(config.trainer.guard, folder, ckpt_every=config.trainer.ckpt_every, say=console.say)
    saver = Checkpoints(folder, config.trainer, Stopping(config.trainer, began, console.say), console.say)
    before = [ExactSteps(config.seed), saver.stopping, guard, *routers, *extra]
    processes = ranks(machine)
    trainer = make_trainer(config, machine, folder, loggers, [*before, metrics, saver, console], clock, processes)
    try:
        with together(processes, call.verb), ending(console, remote, trainer, folder, call), signalled():
            data = _datamodule(config, machine, prepared, val_batches=config.trainer.val_batches)
            trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume), weights_only=True)
            console.say("validating on all held-out text ...")
            trainer.validate(module, datamodule=_datamodule(config, machine, prepared, val_batches=None), verbose=False)
            found = trainer.callback_metrics.items()
            final = {name: float(value) for name, value in found if name.startswith(MEASURED)}
    except Stopped as stopped:
        if stopped.code:
            raise
        return {}
    if not is_first_rank():
        return {}
    saver.export(trainer.global_step)
    if not folder.is_run():
        raise RunFailed(f"{folder.path}: was deleted during training; only {folder.weights} was written since")
    summary = _summary(config, machine, prepared, module.model, final, metrics, began, folder, trainer.global_step)
    _samples(config, folder, machine, console, remote, trainer.global_step, on_meta)
    with replaced(folder.summary) as new:  # the mark of a finished run: written completely or not at all
        new.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    remote.summary(summary)
    remote.close()
    report(console, summary, hints(call, folder, asked, prepared, trainer.global_step))
    return summary


def _prepared(
    config: RunConfig, machine: Machine, start: Start, kernels: KernelChoice, console: Console
) -> tuple[Prepared, dict[str, object]]:
    """The data, and what a checkpoint records of it. UserError: the checkpoint was trained on other data, or the given
    weights with another tokenizer."""
    resumed = start.resumed
    if start.given is not None:
        console.say(f"weights     {start.given.line}")
    prepared = prepare(config.data, report=lambda line: console.say(f"data        {line}"))
    read = data_facts(config, machine.global_batch, prepared)
    if start.given is not None and (added := start.given.added_tokens(prepared.tokenizer)):
        first = start.given.tokenizer.vocab_size
        console.say(
            f"weights     {' '.join(added)} were added to the tokenizer (ids {first:,} to {first + len(added) - 1:,});"
            " their embeddings begin as the mean of all others"
        )
    if config.data.format == "preferences":
        prepared = with_reference(prepared, config, machine, kernels, start.given, start.base, console.say)
        read[BASE] = start.base
    if resumed is not None:
        resumed.refuse_other_data(read, prepared.tokenizer.fingerprint, config.data.changed, console.say)
        _datamodule(config, machine, prepared, val_batches=None).refuse(resumed.position)
    if config.data.packing:
        packed = packed_documents(prepared, config.data.seq_len)
        console.say(f"data        whole documents packed into {packed.windows:,} windows, {packed.efficiency:.1%} full")
    return prepared, read


def _say_machine(folder: RunFolder, machine: Machine, plan: Plan, console: Console) -> None:
    console.say(
        f"run folder  {folder.path}\nmachine     {machine.device_name}, {machine.devices} process(es), precision"
        f" {machine.precision}"
        + "".join(f"\nmachine     {note}" for note in machine.notes)
        + "".join(f"\nmemory      {line}" for line in summary_lines(plan))
    )


def _say_model(
    config: RunConfig, machine: Machine, model: HybridLM, console: Console, folder: RunFolder, start: Start
) -> None:
    """The layers, the optimizer's groups and the steps; layers.txt and plan.txt."""
    table = layer_table(model, config.data.seq_len)
    windows = "windows" if start.plan.sequences == 1 else "pairs of windows"
    if is_first_rank():
        write_or_warn(folder.layers, table + "\n", console.say)
        write_or_warn(folder.plan, full_text(start.plan, plan_inference(config, start.model)), console.say)
    console.say(
        f"\n{table}\n\n{group_table(model_groups(model, config.optim))}\n\n"
        f"exports     {destinations(config.model)}\n\n"
        f"{machine.max_steps} steps of {machine.global_batch} x {config.data.seq_len} tokens"
        f" ({machine.batch_size} x {machine.accumulate} x {machine.devices} {windows})"
        + (f", resuming after step {start.resumed.step}" if start.resumed else "")
        + (f"\n{start.plan.never_reached}" if start.plan.never_reached else "")
    )


def _refuse(config: RunConfig, machine: Machine, folder: RunFolder, resumed: Resumed | None, call: Call) -> None:
    """UserError: the checkpoint does not fit this run, the folder is taken, or a package or a compiler is missing."""
    if resumed is not None:
        resumed.refuse(machine, folder, named=call.named)
    elif is_first_rank() and folder.is_run() and not (call.anew and not folder.resumable()):
        raise folder.taken()
    strategy(config.trainer.strategy, machine)
    refuse_logger(config, folder)
    refuse_missing_kernels(config.optim, machine.device)
    refuse_missing_compiler(config.trainer, machine.device)


@rank_zero_only
def _begin_folder(
    config: RunConfig, folder: RunFolder, prepared: Prepared, resumed: Resumed | None, call: Call
) -> None:
    """Claims the folder (a new run) or updates its configuration (a resumed one)."""
    once = {"data": config.data.model_copy(update={"changed": "refuse"})}  # it applied to this start only
    text = to_yaml(config.model_copy(update=once))
    if resumed is None:
        folder.claim(text, anew=call.anew)
    else:
        folder.rewind(resumed.step)
        folder.rewrite_config(text)
        # Of an earlier end: a run that is killed after its last step has none, and is not finished.
        folder.summary.unlink(missing_ok=True)
    folder.record(call.overrides)
    prepared.tokenizer.save(folder.tokenizer)
    if any(part.train.stream.masked for part in prepared.parts):
        template_of(prepared.tokenizer).save(folder.path)


def _module(
    config: RunConfig,
    machine: Machine,
    prepared: Prepared,
    read: dict[str, Any],
    plan: Plan,
    kernels: KernelChoice = ALL_TORCH,
    given: GivenWeights | None = None,
) -> LitLM:
    model = fresh_model(config.model, prepared.tokenizer.vocab_size, seed=config.seed, device=CPU)
    if given is not None:
        given.load_into(model, prepared.tokenizer.vocab_size)
    model.checkpoint_blocks, model.loss_rows, model.kernels = plan.checkpoint_blocks, plan.loss_rows, kernels
    if config.trainer.compile:
        compile_blocks(model)
    ours = facts(model.config, model.vocab_size, prepared.tokenizer.fingerprint, machine.accumulate, read)
    return LitLM(model, config.optim, machine, facts=ours, sharded=config.trainer.strategy == "fsdp2")


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


def _samples(
    config: RunConfig,
    folder: RunFolder,
    machine: Machine,
    console: Console,
    remote: Remote,
    step: int,
    on_meta: HybridLM,
) -> None:
    """Continues the prompts, or answers examples of a task, with the checkpoint just written, which also verifies that
    it loads."""
    loaded = load_run(str(folder.step_checkpoint(step)), torch.device(machine.device), built=on_meta)
    if config.data.source == "synthetic":
        texts = task_samples(loaded.model, config.data)
    else:
        texts = sampled(loaded.model, loaded.tokenizer, config.callbacks.samples, config.seed)
    for i, text in enumerate(texts):
        console.say(f"\nsample {i + 1}\n    " + text.replace("\n", "\n    "))
    write_samples(folder.samples, texts, console.say)
    if config.data.source != "synthetic":
        remote.samples(step, config.callbacks.samples.prompts, texts)


def _summary(
    config: RunConfig,
    machine: Machine,
    prepared: Prepared,
    model: HybridLM,
    final: dict[str, float],
    metrics: MetricsCallback,
    began: float,
    folder: RunFolder,
    steps: int,
) -> dict[str, Any]:
    val_bytes = sum(part.val.text_bytes for part in prepared.parts)
    val = prepared.parts[0].val if len(prepared.parts) == 1 else None  # a compression ratio is of one text
    return {
        "run": str(folder.path),
        "model": config.model.name,
        "parameters": parameters(model),
        "steps": steps,
        "tokens": steps * machine.global_batch * config.data.sequences * config.data.seq_len,
        **final,
        "gzip_bpb": 8 * val.gzip_bytes / val_bytes if val and val.gzip_bytes else None,
        "xz_bpb": 8 * val.xz_bytes / val_bytes if val and val.xz_bytes else None,
        "val_bytes": val_bytes,
        **metrics.throughput(),
        "seconds": time.perf_counter() - began,
        "device": machine.device_name,
        "devices": machine.devices,
        "torch": torch.__version__,
    }

"""The last lines that a run prints: quality, speed, and what can be done next. Every command in them works as
printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning

from hybridlm.config.overrides import quoted, typed
from hybridlm.config.run import RunConfig
from hybridlm.data.corpus import Prepared
from hybridlm.runs.resume import Call
from hybridlm.runs.run_folder import RunFolder, newest_run
from hybridlm.train.console import Console
from hybridlm.train.loggers import Remote
from hybridlm.train.stopping import Stopped


def hints(call: Call, folder: RunFolder, config: RunConfig, prepared: Prepared, steps: int) -> list[str]:
    """What can be done with a run that has finished ``steps`` steps. config: as it was asked for."""
    run = shlex.quote(name_of(folder))
    found = [(f"{go_on(call, folder)} trainer.max_steps={2 * steps}", "train longer")]
    if any(part.train.stream.masked for part in prepared.parts):
        found.append((f"hybridlm chat {run}", "chat with it"))
    elif prepared.parts:
        prompt = next(iter(config.callbacks.samples.prompts), "The")
        found.append((f"hybridlm generate {run} --prompt {shlex.quote(prompt)} -n 200", "generate text"))
    found.append((f"hybridlm report {run}", "plot its metrics"))
    return [f"  {command}    # {what}" for command, what in found]


def name_of(folder: RunFolder) -> str:
    """How a command names the run: ``last`` if it is the newest, else its path."""
    newest = newest_run(Path.cwd())
    if newest is not None and newest.path.resolve() == folder.path.resolve():
        return "last"
    path = folder.path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def go_on(call: Call, folder: RunFolder) -> str:
    """The command that resumes a run from its newest checkpoint, or starts it again if it has none."""
    name = name_of(folder)
    overrides = [f"ckpt={name}" if re.fullmatch(r"[\w./-]+", name) else f"ckpt={quoted(name)}"]
    if not folder.resumable():
        overrides = [*map(typed, call.overrides), "ckpt=auto", f"hydra.run.dir={quoted(folder.path.absolute())}"]
    return f"{call.program} {shlex.join(overrides)}"


@contextmanager
def ending(
    console: Console, remote: Remote, trainer: lightning.Trainer, folder: RunFolder, call: Call
) -> Iterator[None]:
    """Closes the progress bar however training ends, and the remote logger if it fails; an interrupted run prints how
    to resume it."""
    try:
        yield
    except BaseException as end:
        console.close()
        if isinstance(end, KeyboardInterrupt | SystemExit):
            why = f" by {end.reason}" if isinstance(end, Stopped) else ""
            where = "resume from the last checkpoint" if folder.resumable() else "nothing is saved; start again"
            console.say(f"stopped{why} at step {trainer.global_step}; {where} with {go_on(call, folder)}")
        remote.close()
        raise
    console.close()


def report(console: Console, summary: dict[str, Any], hints: list[str]) -> None:
    """Prints quality, speed and ``hints``."""
    anchors = [(name, summary[key]) for name, key in (("gzip -9", "gzip_bpb"), ("xz -9", "xz_bpb")) if summary[key]]
    lines = [
        "",
        _quality(summary) + "".join(f"; {name} {value:.4f}" for name, value in anchors),
        f"speed       {summary['tokens_per_s']:,.0f} tokens/s, {summary['seconds']:.0f} s in all{_throughput(summary)}",
        "",
        "next:",
        *hints,
    ]
    console.say("\n".join(lines))


def _quality(summary: dict[str, Any]) -> str:
    """The last validation: bits per byte of text, or a synthetic task's accuracy by length."""
    if "val/bpb" in summary:
        return f"validation  {summary['val/bpb']:.4f} bits per byte on {summary['val_bytes'] / 1e3:,.0f} kB held out"
    if "val/margin" in summary:
        return (
            f"validation  {summary['val/accuracy']:.2%} of held-out pairs are ranked right, by a mean margin of"
            f" {summary['val/margin']:.4f}"
        )
    lengths = [name.rpartition("/")[2] for name in summary if name.startswith("val/accuracy/")]
    shares = (
        f"{summary[f'val/accuracy/{n}']:.2%} ({summary[f'val/exact/{n}']:.2%}) at {int(n):,} tokens" for n in lengths
    )
    return f"validation  accuracy (examples with every answer right): {', '.join(shares)}"


def _throughput(summary: dict[str, Any]) -> str:
    """Model FLOP/s, memory, and where the time went."""
    names = (("step", "training"), ("data", "waiting for data"), ("val", "validation"), ("ckpt", "checkpoints"))
    parts = [f"{summary[f'{key}_seconds'] / summary['seconds']:.0%} {name}" for key, name in names]
    memory = "" if summary["memory_gb"] is None else f", {summary['memory_gb']:.1f} GiB peak"
    share = "" if summary["mfu"] is None else f" ({summary['mfu']:.0%} of the peak)"
    return f"; {summary['flops_per_s'] / 1e9:,.1f} GFLOP/s{share}{memory}\ntime        {', '.join(parts)}"

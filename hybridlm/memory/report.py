"""A plan as text: a summary for the start of a run, plan.txt, JSON, and the error if nothing fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec

from hybridlm.config.duration import roughly
from hybridlm.memory.plan import Plan
from hybridlm.memory.speed import Inference
from hybridlm.memory.suggest import Suggestion
from hybridlm.memory.timeline import WORKSPACE
from hybridlm.model.count import byte_text, count_text

_ESTIMATE = "estimated from peaks"


def summary_lines(plan: Plan) -> list[str]:
    """The lines that a run logs at its start."""
    limit = "" if plan.limit_bytes is None else f" of {byte_text(plan.limit_bytes)}"
    largest = sorted(plan.peak.parts.items(), key=lambda part: -part[1])[:3]
    return [
        f"{plan.batch_size} x {plan.accumulate} x {plan.devices} {plan.unit} of {plan.seq_len}, {_checkpointing(plan)}",
        f"planned {byte_text(plan.reserved_bytes)}{limit}; {byte_text(plan.peak.bytes)} without the margin, mostly "
        + ", ".join(f"{name.replace(', ', ' of ')} {byte_text(size)}" for name, size in largest),
    ]


def full_text(plan: Plan, inference: Inference) -> str:
    """The text of plan.txt and ``hybridlm plan``."""
    at_most = " at most (a tokenizer trained on a small corpus has fewer)" if plan.vocabulary.bound else ""
    limit = "unknown" if plan.limit_bytes is None else byte_text(plan.limit_bytes)
    held = {**plan.peak.parts, WORKSPACE: plan.peak.parts.get(WORKSPACE, 0)}
    parts = sorted(held.items(), key=lambda part: part[0] == WORKSPACE)
    lines = [
        f"device      {plan.device}, {plan.devices} process(es), precision {plan.precision}",
        (
            f"model       {count_text(plan.parameters)} parameters, {plan.layers} layers, {plan.vocabulary.ids:,}"
            f" ids{at_most}"
        ),
        (
            f"step        {plan.global_batch} {plan.unit} of {plan.seq_len} tokens = micro-batch {plan.batch_size} x"
            f" accumulation {plan.accumulate} x devices {plan.devices}"
        ),
        f"            {_checkpointing(plan)}; loss in chunks of {plan.loss_rows} rows of logits",
        "",
        *_columns([("held at the peak", "bytes"), *[(name, byte_text(size)) for name, size in parts]]),
        *_columns(
            [
                (f"peak ({plan.peak.moment})", byte_text(plan.peak.bytes)),
                ("fragmentation (margin)", byte_text(plan.reserved_bytes - plan.peak.bytes)),
                ("peak with the margin", byte_text(plan.reserved_bytes)),
                ("available", limit),
                ("fits", "yes" if plan.fits else "no"),
            ]
        ),
    ]
    lines += ["", f"training    {training_text(plan)}"]
    if plan.never_reached is not None:
        lines.append(f"            {plan.never_reached}")
    if plan.compiled:
        lines += ["", "trainer.compile: planned without compilation"]
    return "\n".join([*lines, "", *_inference_lines(inference)]) + "\n"


def training_text(plan: Plan) -> str:
    """The length of the run and, if the device's peaks are known, its estimated time."""
    length = f"{plan.max_steps:,} steps, {count_text(plan.tokens)} tokens"
    if plan.tokens_per_s is None or plan.seconds is None:
        return f"{length}; no estimate of its time: no profile has this device's peak in {plan.precision}"
    return f"{length}: about {roughly(plan.seconds)} at {plan.tokens_per_s:,.0f} tokens/s ({_ESTIMATE}, not measured)"


def json_text(plan: Plan, inference: Inference, found: Sequence[Suggestion]) -> str:
    """One JSON object, with bytes and tokens per second."""
    peak = {"peak_bytes": plan.peak.bytes, "parts": plan.peak.parts, "moment": plan.peak.moment}
    fields = asdict(plan) | peak | {"tokens": plan.tokens, "seconds": plan.seconds, "inference": asdict(inference)}
    del fields["peak"]
    fields["suggestions"] = [
        {
            "overrides": list(item.change.overrides),
            "reserved_bytes": item.reserved_bytes,
            "tokens_per_s": item.tokens_per_s,
        }
        for item in found
    ]
    return json.dumps(fields)


def refusal(plan: Plan, found: Sequence[Suggestion]) -> list[str]:
    """A line with what is needed and available, and one for each change that fits."""
    assert plan.limit_bytes is not None
    needs = (
        f"this run needs {byte_text(plan.reserved_bytes)} of memory, and {plan.device} has"
        f" {byte_text(plan.limit_bytes)}, at data.batch_size={plan.batch_size}"
        f" trainer.checkpoint_blocks={plan.checkpoint_blocks} (hybridlm plan shows what needs it)"
    )
    if not found:
        return [f"{needs}; no change that was tried makes it fit: use a smaller model or a larger device"]
    return [needs, *[f"fits with {' '.join(item.change.overrides)}: {_outcome(item)}" for item in found]]


def _outcome(item: Suggestion) -> str:
    speed = "" if item.tokens_per_s is None else f", about {item.tokens_per_s:,.0f} tokens/s ({_ESTIMATE})"
    missing = "optim=adamw8bit" in item.change.overrides and find_spec("bitsandbytes") is None
    return f"at least {byte_text(item.reserved_bytes)}{speed}{'; needs pip install bitsandbytes' if missing else ''}"


def _checkpointing(plan: Plan) -> str:
    every = plan.checkpoint_blocks
    if not every:
        return "no activation checkpointing"
    return f"activation checkpointing of {'every layer' if every == 1 else f'1 layer in {every}'}"


def _inference_lines(inference: Inference) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("generating, one sequence", "cache", "all attention", "ratio", "prefill", "decode"),
        *(
            (
                f"{context.tokens:,} tokens",
                byte_text(context.cache),
                byte_text(context.attention),
                f"{context.cache / context.attention if context.attention else 0.0:.3f}",
                *("" if speed is None else f"{speed:,.0f}" for speed in (context.prefill, context.decode)),
            )
            for context in inference.contexts
        ),
    ]
    known = any(context.prefill is not None for context in inference.contexts)
    speeds = f"tokens/s are {_ESTIMATE}, not measured" if known else "no tokens/s: no profile has this device's peaks"
    weights = f"weights     {byte_text(inference.weights)} in {inference.dtype}; {speeds}"
    return [weights, "", *_columns(rows)]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column aligned left, the others right, with minimum widths so that the tables line up."""
    least = (28, *[10] * (len(rows[0]) - 1))
    widths = [max(width, *(len(row[i]) for row in rows)) for i, width in enumerate(least)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]

"""A run shown alone: its outcome in sentences, and a table of its settings and figures."""

from __future__ import annotations

from collections.abc import Iterator

from hybridlm.report.metrics import COSTS, Metric, scale
from hybridlm.report.run_files import number
from hybridlm.report.runs import Run
from hybridlm.report.table import Cell, Column, Table
from hybridlm.report.verdict import epochs, percent, unit_name

# Fields of config.yaml in the order of the table.
_FIELDS = {
    "model": "model.name",
    "size": "size.name",
    "pattern": "model.pattern",
    "layers": "model.n_layers",
    "width": "model.d_model",
    "data": "data.source",
    "texts": "data.path",
    "task": "data.synthetic.task",
    "tokenizer": "data.tokenizer.kind",
    "sequence length": "data.seq_len",
    "sequences per step": "data.global_batch",
    "steps": "trainer.max_steps",
    "optimizer": "optim.name",
    "learning rate": "optim.lr",
    "learning rate of Muon": "optim.muon.lr",
    "schedule": "optim.schedule",
    "warm-up": "optim.warmup",
    "weight decay": "optim.weight_decay",
    "precision": "trainer.precision",
    "seed": "seed",
}


def outcome(run: Run, quality: Metric) -> list[str]:
    """How good the run is and what compressors make of the same text; if it has not finished, how far it got."""
    value = quality.of(run)
    if value is not None:
        anchors = {name: number(run.summary.get(f"{name}_bpb")) for name in ("gzip", "xz")}
        reached = [f"{name} reaches {bpb:.4f}" for name, bpb in anchors.items() if bpb is not None]
        compressors = f" On the same text {' and '.join(reached)}." if reached and quality.unit == "bits/byte" else ""
        sentences = [f"{quality.text(value)} {unit_name(quality)} at the end of training.{compressors}"]
    else:
        reason = run.error or (f"the last metrics are from step {run.rows[-1]['step']}" if run.rows else "")
        sentences = [f"{run.status.capitalize()}{f': {reason}' if reason else ''}."]
    validations = [(found, row["step"]) for row in run.rows if (found := number(row.get(quality.key))) is not None]
    if validations:
        best, step = quality.best(validations)
        sentences.append(
            f"The best validation during training: {quality.text(best)} {unit_name(quality)} at step {step}."
        )
    return sentences


def setup_table(run: Run) -> Table:
    """A row per setting with its field, then one per figure."""
    rows = (tuple(map(Cell, row)) for row in (*_settings(run), *_figures(run)))
    return Table(tuple(map(Column, ("setting", "value", "field"))), tuple(rows))


def _settings(run: Run) -> Iterator[tuple[str, str, str]]:
    generated = run.config.get("data.source") == "synthetic"
    left_out = ["texts", "tokenizer"] if generated else ["task"]
    left_out += [] if run.setting("optim.name") == "muon" else ["learning rate of Muon"]
    for title, field in _FIELDS.items():
        value = run.setting(field)
        if title not in left_out and value not in (None, "null", ""):
            yield title, value or "", field


def _figures(run: Run) -> Iterator[tuple[str, str, str]]:
    for metric in COSTS:
        if (value := metric.of(run)) is not None:
            scaled = scale([value], metric.unit)
            yield metric.title, f"{scaled.text(value)} {scaled.unit}".strip(), ""
    if (steps := number(run.summary.get("steps"))) is not None:
        yield "steps done", f"{steps:,.0f}", ""
    if (seen := epochs(run)) is not None:
        yield "training text seen", percent(seen) if seen < 1 else f"{seen:.2f} times", ""
    if run.rows and (skipped := number(run.rows[-1].get("optim/skipped_steps"))) is not None:
        yield "skipped steps", f"{skipped:.0f}", ""
    for key in ("device", "torch"):
        if run.summary.get(key):
            yield key, str(run.summary[key]), ""

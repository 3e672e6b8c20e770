"""How one run was set up, and what it came to, as a table of two columns."""

from __future__ import annotations

from collections.abc import Iterator

from hybridlm.report.cautions import passes, share
from hybridlm.report.facts import number
from hybridlm.report.measures import COSTS
from hybridlm.report.reading import Run
from hybridlm.report.table import Cell, Column, Table, scale

# Fields of config.yaml in the order of the table; a group of settings may be there or not, as the run was of text or of
# a task.
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


def setup_table(run: Run) -> Table:
    """A row per setting with its field, then one per figure."""
    rows = [*_settings(run), *_figures(run)]
    columns = (Column("what", "", False), Column("value", "", False), Column("field", "", False))
    return Table(columns, tuple(tuple(Cell(text, text) for text in row) for row in rows))


def _settings(run: Run) -> Iterator[tuple[str, str, str]]:
    generated = run.config.get("data.source") == "synthetic"
    left_out = ["texts", "tokenizer"] if generated else ["task"]
    left_out += [] if run.setting("optim.name") == "muon" else ["learning rate of Muon"]
    for what, field in _FIELDS.items():
        value = run.setting(field)
        if what not in left_out and value not in (None, "null", ""):
            yield what, value or "", field


def _figures(run: Run) -> Iterator[tuple[str, str, str]]:
    for measure in COSTS:
        if (value := measure.of(run)) is not None:
            scaled = scale([value], measure.unit)
            yield measure.title, f"{scaled.text(value)} {scaled.unit}".strip(), ""
    if (steps := number(run.summary.get("steps"))) is not None:
        yield "steps done", f"{steps:,.0f}", ""
    if (seen := passes(run)) is not None:
        yield "training text seen", share(seen) if seen < 1 else f"{seen:.2f} times", ""
    if (skipped := number(run.rows[-1].get("optim/skipped_steps")) if run.rows else None) is not None:
        yield "steps skipped", f"{skipped:.0f}", ""
    for key in ("device", "torch"):
        if run.summary.get(key):
            yield key, str(run.summary[key]), ""

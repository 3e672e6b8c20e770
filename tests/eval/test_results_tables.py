"""Results as tables."""

from __future__ import annotations

from rich.console import Console

from hybridlm.eval.results import Record, print_records


def record(what, settings, metrics, curve=()):
    return Record(
        what=what, checkpoint="a.ckpt", step=3, ema=False, settings=settings, metrics=metrics, curve=list(curve)
    )


LOSS = record(
    "loss",
    {"split": "val", "context": 64, "stride": 32},
    {"loss": 1.25, "ppl": 3.5, "bpb": 0.75, "tokens": 12345, "documents": 7},
    [{"first": 1, "last": 1, "loss": 2.0, "tokens": 7}, {"first": 2, "last": 2, "loss": 1.0, "tokens": 1234}],
)


def printed(records):
    console = Console(record=True, width=120)
    print_records(records, console)
    return console.export_text()


def test_tables_have_every_number():
    part = record("loss", LOSS.settings | {"part": "code"}, {"loss": 1.5, "ppl": 4.5, "tokens": 5, "documents": 1})
    answers = record("answers/mqar", {"context": 32}, {"accuracy": 0.5, "answers": 1000})
    text = printed([part, LOSS, answers])
    for cell in ("val, code", "1.5000", "1.2500", "0.7500", "12,345", "1,234", "answers/mqar, 32 tokens", "1,000"):
        assert cell in text
    bars = [line.count("#") for line in text.splitlines() if "#" in line]
    assert bars == [40, 20], "in proportion to the loss"
    assert "#" not in printed([part, answers])

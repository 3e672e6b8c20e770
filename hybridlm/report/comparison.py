"""Groups runs into configurations (runs that differ in the seed alone), and configurations into comparisons (runs
validated on the same text or task)."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hybridlm.config.overrides import key_of
from hybridlm.report.metrics import QUALITIES, Metric, Spread, spread
from hybridlm.report.runs import Run, as_text, number

# Settings that do not influence what a run learns, and the seed, over which means are taken.
_IGNORED = (
    "seed",
    "ckpt",
    "sweep.matched",
    "logger.",
    "data.out",
    "trainer.headless",
    "trainer.time_limit",
    "trainer.requeue",
    "callbacks.samples.",
)
# Settings of ``data`` that do not change which text, or which task, a run is validated on.
_NOT_TEXT = (
    "seq_len",
    "val_seq_len",
    "global_batch",
    "batch_size",
    "packing",
    "isolate",
    "out",
    "shard_mb",
    "prepare_workers",
    "workers",
)
# Settings that define the held-out examples of a generated task, on which val/accuracy is measured; the others are for
# training or are not read.
_TASK = ("task", "vocab_size", "n_pairs", "n_items", "modulus", "val_examples", "seed")
_OF_TASK = ("source", "seq_len", *(f"synthetic.{name}" for name in _TASK))
# The columns tried first to tell configurations apart.
_PREFERRED = (
    "model.name",
    "size.name",
    "model.pattern",
    "model.n_layers",
    "model.d_model",
    "optim.name",
    "optim.lr",
    "hardware.name",
)
DEVICE = "device"
_UNNAMED = ("model", "size", "model.name", "size.name", "model.pattern", DEVICE)  # the value alone says what it is
Settings = Mapping[str, str]
_THREADS = re.compile(r", \d+ threads$")


@dataclass(frozen=True)
class Configuration:
    """Runs with the same settings and different seeds. settings: by column of the comparison, as text."""

    name: str
    settings: Settings
    runs: tuple[Run, ...]

    def spread(self, metric: Metric) -> Spread | None:
        return spread(value for run in self.runs if (value := metric.of(run)) is not None)


@dataclass(frozen=True)
class Comparison:
    """Runs validated on the same text or task. configurations: of finished runs, the best by ``quality`` first.

    columns: the settings that tell the configurations apart; tuned: those shown at their best value only; passed_over:
    the configurations with the other values; unfinished: runs without a summary.
    """

    title: str
    quality: Metric
    columns: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    unfinished: tuple[Run, ...]
    tuned: tuple[str, ...] = ()
    passed_over: tuple[Configuration, ...] = ()

    @property
    def tried(self) -> tuple[Configuration, ...]:
        return (*self.configurations, *self.passed_over)

    @property
    def runs(self) -> list[Run]:
        return [run for tried in self.tried for run in tried.runs] + list(self.unfinished)

    def settings_of(self, run: Run) -> Settings:
        return _settings(run, self.columns)

    def name_of(self, settings: Settings, without: Collection[str] = ()) -> str:
        """Settings on one line, except the columns ``without`` and those in which all configurations agree."""
        return _name(settings, {*without, *_shared([one.settings for one in self.tried])})

    def ranked(self) -> list[tuple[Configuration, Spread]]:
        """The configurations with a finite quality, best first."""
        return [(one, found) for one in self.configurations if (found := one.spread(self.quality)) is not None]


def compare(runs: Sequence[Run], varied: Sequence[str] = ()) -> list[Comparison]:
    """``runs`` in as few comparisons as can be ranked, the one with most runs first. varied: fields that a sweep
    varied."""
    texts: dict[object, list[Run]] = defaultdict(list)
    for run in [run for run in runs if run.finished]:
        texts[_text(run)].append(run)
    groups = sorted(texts.values(), key=len, reverse=True) or [[]]
    unfinished: list[list[Run]] = [[] for _ in groups]
    for run in [run for run in runs if not run.finished]:
        # It goes with runs on the same data, as far as its configuration tells.
        alike = (others for others, group in zip(unfinished, groups, strict=True) if _data(run) in map(_data, group))
        next(alike, unfinished[0]).append(run)
    return [_comparison(group, others, varied) for group, others in zip(groups, unfinished, strict=True)]


def best_of(comparison: Comparison, tuned: Collection[str]) -> Comparison:
    """Keeps, of configurations that differ in the settings ``tuned`` alone, the best one: each model at its own
    learning rate, for instance.

    A value with which some run failed or diverged ranks after the others: the mean of its surviving runs flatters it.
    """
    columns = tuple(column for column in comparison.columns if column in tuned)
    failed = [comparison.settings_of(run) for run in comparison.unfinished if run.status == "failed"]

    def unreliable(one: Configuration) -> bool:
        found = one.spread(comparison.quality)
        return found is None or found.n < len(one.runs) or one.settings in failed

    best: dict[tuple[str, ...], Configuration] = {}
    for one in sorted(comparison.configurations, key=unreliable):  # a stable sort: the best of each kind comes first
        best.setdefault(tuple(value for column, value in one.settings.items() if column not in columns), one)
    chosen = set(map(id, best.values()))
    kept = tuple(one for one in comparison.configurations if id(one) in chosen)
    others = tuple(one for one in comparison.configurations if id(one) not in chosen)
    return replace(comparison, configurations=kept, tuned=columns, passed_over=others) if others else comparison


def _data(run: Run) -> tuple[tuple[str, str], ...]:
    """The settings that determine the text or the task."""
    items = ((key.removeprefix("data."), value) for key, value in run.config.items() if key.startswith("data."))
    generated = run.config.get("data.source") == "synthetic"
    chosen = ((key, value) for key, value in items if (key in _OF_TASK if generated else key not in _NOT_TEXT))
    return tuple(sorted((key, json.dumps(value)) for key, value in chosen))


def _text(run: Run) -> object:
    """Equal for equal validation texts. A text that two programs compress to the same sizes is the same, whatever the
    tokenizer; if that was not measured, or there are no bytes to count, the settings of the data decide."""
    facts = [run.summary.get(key) for key in ("val_bytes", "gzip_bpb", "xz_bpb")]
    return tuple(facts) if all(facts) and run.summary.get("val/bpb") is not None else (_data(run), facts[0])


def _comparison(finished: list[Run], unfinished: list[Run], varied: Sequence[str]) -> Comparison:
    # If no run has finished, the metric they were validated by during training.
    measured = [{one.key for one in QUALITIES if one.of(run) is not None} for run in finished]
    measured += [{key for row in run.rows for key in row} for run in unfinished if not finished]
    quality = next((one for one in QUALITIES if any(one.key in keys for keys in measured)), QUALITIES[0])
    columns = _columns(finished, unfinished, varied)
    groups: dict[object, list[Run]] = defaultdict(list)
    for run in finished:
        groups[identity(run)].append(run)
    shared = _shared([_settings(runs[0], columns) for runs in groups.values()])
    configurations = []
    for first, *others in groups.values():
        settings = _settings(first, columns)
        name = _name(settings, shared) or first.setting("model.pattern") or first.setting("model.name")
        configurations.append(Configuration(name or first.name, settings, (first, *others)))

    def rank(one: Configuration) -> float:
        found = one.spread(quality)
        return math.inf if found is None else found.mean * (-1 if quality.better == "more" else 1)

    title = _title((finished or unfinished)[0]) if finished or unfinished else "No finished run"
    return Comparison(title, quality, columns, tuple(sorted(configurations, key=rank)), tuple(unfinished))


def _shared(settings: Sequence[Settings]) -> list[str]:
    """The columns in which several configurations all agree; names do without them."""
    columns = settings[0] if len(settings) > 1 else ()
    return [column for column in columns if len({values[column] for values in settings}) == 1]


def _name(settings: Settings, without: Collection[str]) -> str:
    return ", ".join(
        value if column in _UNNAMED else f"{column.removesuffix('.name').rpartition('.')[2]}={value}"
        for column, value in settings.items()
        if column not in without
    )


def identity(run: Run) -> frozenset[tuple[str, str]]:
    """All settings that influence the result, except the seed."""
    items = {(key, as_text(value)) for key, value in run.config.items() if _matters(key)}
    return frozenset(items | {(DEVICE, device_of(run))})


def device_of(run: Run) -> str:
    """Without the number of threads, which changes the speed but not the result: the seeds of one configuration may
    have run with different numbers."""
    return _THREADS.sub("", as_text(run.summary.get(DEVICE, "")))


def _matters(key: str) -> bool:
    """Whether a field, or a group (``logger``), influences the result."""
    return not f"{key}.".startswith(_IGNORED)


def _settings(run: Run, columns: Iterable[str]) -> Settings:
    values = {column: run.setting(column) for column in columns}
    if DEVICE in values and DEVICE in run.summary:
        values[DEVICE] = device_of(run)
    return {column: "-" if value is None else value for column, value in values.items()}


def _columns(finished: list[Run], unfinished: list[Run], varied: Sequence[str]) -> tuple[str, ...]:
    """What the user varied, then other settings until all configurations are told apart."""
    everyone = finished + unfinished
    given = dict.fromkeys([*varied, *(key_of(line) for run in everyone for line in run.overrides)])
    matched = " ".join(run.setting("sweep.matched") or "" for run in everyone).split()  # follow from the others
    chosen = [
        key
        for key in given
        if _matters(key) and key not in matched and len({run.setting(key) for run in everyone} - {None}) > 1
    ]
    keys = dict.fromkeys(key for run in finished for key in run.config if _matters(key))
    others = sorted(keys, key=lambda key: _PREFERRED.index(key) if key in _PREFERRED else len(_PREFERRED))
    distinct = {identity(run): run for run in finished}

    def told_apart(columns: Sequence[str]) -> int:
        return len({tuple(_settings(run, columns).values()) for run in distinct.values()})

    for key in [*others, DEVICE]:
        told = told_apart(chosen)
        if told < len(distinct) and told_apart([*chosen, key]) > told:
            chosen.append(key)
    return tuple(sorted(chosen, key=lambda key: key not in _UNNAMED))  # what a model is comes before its settings


def _title(run: Run) -> str:
    name = run.setting("data") or run.setting("data.source") or "data"
    task = run.setting("data.synthetic.task") if run.setting("data.source") == "synthetic" else None
    size = number(run.summary.get("val_bytes"))
    return f"{name}{f' {task}' if task else ''}{f', {size / 1e3:,.0f} kB held out' if size else ''}"

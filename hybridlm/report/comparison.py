"""Runs that can be compared, gathered into points: runs of one configuration that differ in the seed alone."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from hybridlm.config.overrides import key_of
from hybridlm.report.facts import written_number
from hybridlm.report.measures import QUALITIES, Measure
from hybridlm.report.reading import Run, shown
from hybridlm.report.spread import Spread, spread

# Settings without a part in what a run comes to, beside the seed, over which means are taken.
_NO_PART = (
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
# Settings that make the held-out examples of a generated task, on which val/accuracy is measured; the others are of
# training or not read.
_TASK = ("task", "vocab_size", "n_pairs", "n_items", "modulus", "val_examples", "seed")
_OF_TASK = ("source", "seq_len", *(f"synthetic.{name}" for name in _TASK))
_TELLING = (
    "model.name",
    "size.name",
    "model.pattern",
    "model.n_layers",
    "model.d_model",
    "optim.name",
    "optim.lr",
    "hardware.name",
)
_PLAIN = (
    "model",
    "size",
    "model.name",
    "size.name",
    "model.pattern",
    "device",
)  # their values need no name beside them
DEVICE = "device"
_THREADS = re.compile(r", \d+ threads$")


@dataclass(frozen=True)
class Point:
    """settings: one value per column of its comparison, shown as text."""

    name: str
    settings: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def identity(self) -> frozenset[tuple[str, str]]:
        """All settings that its runs have in common and that have a part in what they come to."""
        return _identity(self.runs[0])

    def spread(self, measure: Measure) -> Spread | None:
        return spread(value for run in self.runs if (value := measure.of(run)) is not None)


@dataclass(frozen=True)
class Comparison:
    """Runs validated on one text, or one task. points: of finished runs, the best by ``quality`` first. lost: runs that
    have not finished.

    columns: the settings that tell the points apart; tuned: those of which each point has its best value; passed_over:
    the other values.
    """

    title: str
    quality: Measure
    columns: tuple[str, ...]
    points: tuple[Point, ...]
    lost: tuple[Run, ...]
    notes: tuple[str, ...]
    tuned: tuple[str, ...] = ()
    passed_over: tuple[Point, ...] = ()

    @property
    def runs(self) -> list[Run]:
        return [run for point in (*self.points, *self.passed_over) for run in point.runs] + list(self.lost)

    def settings_of(self, run: Run) -> tuple[str, ...]:
        return tuple(_setting(run, column) for column in self.columns)

    def name_of(self, settings: Sequence[str], without: Collection[str] = ()) -> str:
        """A point's settings in a line, but for the columns ``without`` and those in which no point differs."""
        same = _same(self.columns, [point.settings for point in (*self.points, *self.passed_over)])
        return _name(self.columns, settings, {*without, *same})

    def ranked(self) -> list[tuple[Point, Spread]]:
        """The points whose quality is a number, best first."""
        return [(point, found) for point in self.points if (found := point.spread(self.quality)) is not None]


def compare(runs: Sequence[Run], varied: Sequence[str] = ()) -> list[Comparison]:
    """``runs`` in as few comparisons as can be ranked, the one of most runs first. varied: fields that a sweep says
    differ."""
    texts: dict[object, list[Run]] = defaultdict(list)
    for run in runs:
        if run.finished:
            texts[_text(run)].append(run)
    groups = sorted(texts.values(), key=len, reverse=True) or [[]]
    lost: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        if not run.finished:  # beside runs of its data, as far as its configuration tells
            alike = (i for i, group in enumerate(groups) if any(_data(run) == _data(other) for other in group))
            lost[next(alike, 0)].append(run)
    return [_comparison(group, lost[i], varied) for i, group in enumerate(groups)]


def best_of(comparison: Comparison, tuned: Collection[str]) -> Comparison:
    """Of points that differ in the settings ``tuned`` alone only the best: each model at its own learning rate, for
    instance.

    A value with which some run failed or gave no number comes after the others: the mean of those that survived
    flatters it.
    """
    tried = tuple(column for column in comparison.columns if column in tuned)
    best: dict[tuple[str, ...], Point] = {}
    failed = {comparison.settings_of(run) for run in comparison.lost if run.status == "failed"}

    def fell(point: Point) -> bool:
        found = point.spread(comparison.quality)
        return found is None or found.n < len(point.runs) or point.settings in failed

    for point in sorted(comparison.points, key=fell):  # of each sort the best first
        best.setdefault(
            tuple(s for c, s in zip(comparison.columns, point.settings, strict=True) if c not in tried), point
        )
    chosen = set(map(id, best.values()))
    kept = tuple(point for point in comparison.points if id(point) in chosen)
    others = tuple(point for point in comparison.points if id(point) not in chosen)
    if not others:
        return comparison
    values = {
        column: {point.settings[comparison.columns.index(column)]: None for point in comparison.points}
        for column in tried
    }
    said = "; ".join(f"{column} ({', '.join(sorted(found, key=_by_size))})" for column, found in values.items())
    note = (
        f"Each point has the best of what was tried of {said}, by its mean; values with which a run failed or gave no"
        " number come last. That favours points with more tries. Runs with the other values,"
        f" {sum(len(point.runs) for point in others)}, are in report.csv and below."
    )
    return replace(comparison, points=kept, notes=(note, *comparison.notes), tuned=tried, passed_over=others)


def _by_size(text: str) -> tuple[bool, float, str]:
    value = written_number(text)
    return value is None, value or 0.0, text


def _data(run: Run) -> tuple[tuple[str, str], ...]:
    """The settings that say which text, or which task, it is."""
    items = ((key.removeprefix("data."), value) for key, value in run.config.items() if key.startswith("data."))
    generated = run.config.get("data.source") == "synthetic"
    return tuple(
        sorted(
            (key, json.dumps(value)) for key, value in items if (key in _OF_TASK if generated else key not in _NOT_TEXT)
        )
    )


def _text(run: Run) -> object:
    """Equal where the validation text is. A text compressed by two programs to the same sizes is the same, whatever its
    tokens are; where that was not measured, and where there are no bytes to count, the settings of the data speak."""
    facts = [run.summary.get(key) for key in ("val_bytes", "gzip_bpb", "xz_bpb")]
    return tuple(facts) if all(facts) and run.summary.get("val/bpb") is not None else (_data(run), facts[0])


def _comparison(finished: list[Run], lost: list[Run], varied: Sequence[str]) -> Comparison:
    quality = _quality(finished, lost)
    columns = _columns(finished, lost, varied)
    together: dict[object, list[Run]] = defaultdict(list)
    for run in finished:
        together[_identity(run)].append(run)
    settings = {identity: tuple(_setting(runs[0], column) for column in columns) for identity, runs in together.items()}
    same = _same(columns, list(settings.values()))
    points = [_point(runs, columns, settings[identity], same) for identity, runs in together.items()]
    sign = -1.0 if quality.better == "more" else 1.0

    def rank(point: Point) -> tuple[bool, float]:
        found = point.spread(quality)
        return (True, 0.0) if found is None else (False, sign * found.mean)

    points.sort(key=rank)
    return Comparison(
        _title(finished or lost), quality, columns, tuple(points), tuple(lost), tuple(_notes(points, quality))
    )


def _quality(finished: list[Run], lost: list[Run]) -> Measure:
    """Of runs of which none has finished, what they were validated by on their way."""

    def measured(one: Measure, run: Run) -> bool:
        return one.of(run) is not None if finished else any(one.key in row for row in run.rows)

    return next((one for one in QUALITIES if any(measured(one, run) for run in finished or lost)), QUALITIES[0])


def _point(runs: list[Run], columns: Sequence[str], settings: tuple[str, ...], same: Collection[str]) -> Point:
    first = runs[0]
    name = _name(columns, settings, same) or first.setting("model.pattern") or first.setting("model.name") or first.name
    return Point(name, settings, tuple(runs))


def _same(columns: Sequence[str], points: Sequence[tuple[str, ...]]) -> list[str]:
    """The columns in which several points do not differ, and which no name needs."""
    if len(points) < 2:
        return []
    return [column for column, values in zip(columns, zip(*points, strict=True), strict=True) if len(set(values)) == 1]


def _name(columns: Sequence[str], settings: Sequence[str], without: Collection[str] = ()) -> str:
    named = [
        value if column in _PLAIN else f"{column.removesuffix('.name').rpartition('.')[2]}={value}"
        for column, value in zip(columns, settings, strict=True)
        if column not in without
    ]
    return ", ".join(named)


def _identity(run: Run) -> frozenset[tuple[str, str]]:
    items = {(key, shown(value)) for key, value in run.config.items() if _has_part(key)}
    return frozenset(items | {(DEVICE, _device(run))})


def _device(run: Run) -> str:
    """Without the number of threads, which changes the speed and not what is learned: seeds of one point may have run
    with several."""
    return _THREADS.sub("", shown(run.summary.get("device", "")))


def _has_part(key: str) -> bool:
    """Of a field, or of a group (``logger``), whose fields are named behind a dot."""
    return not f"{key}.".startswith(_NO_PART)


def _setting(run: Run, column: str) -> str:
    value = _device(run) if column == DEVICE and "device" in run.summary else run.setting(column)
    return "-" if value is None else value


def _columns(finished: list[Run], lost: list[Run], varied: Sequence[str]) -> tuple[str, ...]:
    """What the user varied, and then other settings, until all points are told apart."""
    everyone = finished + lost
    given = dict.fromkeys([*varied, *(key_of(line) for run in everyone for line in run.overrides)])
    asked = [key for key in given if _has_part(key) and len({run.setting(key) for run in everyone} - {None}) > 1]
    asked = [key for key in asked if not any(_matched(run, key) for run in everyone)]
    keys = dict.fromkeys(key for run in finished for key in run.config if _has_part(key))
    telling = sorted(keys, key=lambda key: _TELLING.index(key) if key in _TELLING else len(_TELLING))
    points = {_identity(run): run for run in finished}
    chosen = list(asked)
    told = _told_apart(points.values(), chosen)
    for key in [*telling, DEVICE]:
        if told == len(points):
            break
        if (more := _told_apart(points.values(), [*chosen, key])) > told:
            chosen, told = [*chosen, key], more
    return tuple(sorted(chosen, key=lambda key: key not in _PLAIN))  # what a model is comes before its settings


def _matched(run: Run, key: str) -> bool:
    """Whether ``sweep.match`` set the field, which then follows from the others."""
    return f"{key} " in (run.setting("sweep.matched") or "")


def _told_apart(runs: Iterable[Run], columns: Sequence[str]) -> int:
    return len({tuple(_setting(run, column) for column in columns) for run in runs})


def _title(runs: list[Run]) -> str:
    if not runs:
        return "No finished run"
    first = runs[0]
    name = first.setting("data") or first.setting("data.source") or "data"
    task = first.setting("data.synthetic.task") if first.setting("data.source") == "synthetic" else None
    size = first.summary.get("val_bytes")
    held_out = f", {size / 1e3:,.0f} kB held out" if isinstance(size, int | float) and size else ""
    return f"{name}{f' {task}' if task else ''}{held_out}"


def _notes(points: list[Point], quality: Measure) -> list[str]:
    """What a reader has to know before believing the table."""
    runs = [run for point in points for run in point.runs]
    notes = []
    if len({_device(run) for run in runs}) > 1:
        notes.append(
            "The runs were made on different devices: speed, memory and time of one do not compare with those of"
            " another."
        )
    elif len({run.summary.get(DEVICE) for run in runs}) > 1:
        notes.append("The runs had different numbers of threads: their speeds and times do not compare.")
    with_text = [run for run in runs if run.setting("data.source") != "synthetic"]
    if (
        len(
            {tuple(run.setting(f"data.tokenizer.{key}") for key in ("kind", "path", "vocab_size")) for run in with_text}
        )
        > 1
    ):
        notes.append("The runs have different tokenizers: bits per byte compare, losses per token and tokens/s do not.")
    if again := [point.name for point in points if len({run.seed for run in point.runs}) < len(point.runs)]:
        notes.append(f"Runs of the same seed are in the mean of {some(again)}.")
    odd = [point.name for point in points if (found := point.spread(quality)) is None or found.n < len(point.runs)]
    if odd:
        notes.append(f"Not a number in some run of {some(odd)}; it is left out of the mean.")
    if len(runs) > 1 and all(shown(run.summary.get(DEVICE, "")).startswith("CPU") and not run.job for run in runs):
        notes.append(
            "Memory on a CPU is the whole process's: the jobs of one train.py -m share it, and it never falls between"
            " them."
        )
    return notes


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of ``names``, and how many more there are."""
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

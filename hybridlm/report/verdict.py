"""What the table says, in sentences, and what it does not."""

from __future__ import annotations

from collections import Counter

from hybridlm.report.comparison import Comparison, Point, some
from hybridlm.report.facts import number
from hybridlm.report.measures import CACHE, FLOPS, SPEED, Measure
from hybridlm.report.reading import Run
from hybridlm.report.spread import Difference, Spread, difference

_DIGITS = {"share": 3}


def quality_text(value: float, measure: Measure) -> str:
    return f"{value:.{_DIGITS.get(measure.unit, 4)}f}"


def differences(comparison: Comparison) -> list[Difference]:
    """Of every ranked point to the best one, which is the first."""
    spreads = [found for _, found in comparison.ranked()]
    return [difference(one, spreads[0], spreads) for one in spreads]


def verdict(comparison: Comparison) -> list[str]:
    """Sentences: which point is best, by how much, and whether seeds alone would make such a difference."""
    return [*_compared(comparison), *([_lost(comparison)] if comparison.lost else [])]


def outcome(run: Run, quality: Measure) -> list[str]:
    """Sentences on a run alone: how good it is, what compressors make of the same text, and, where it has not ended,
    how far it is."""
    value = quality.of(run)
    sentences = []
    if value is not None:
        sentences.append(
            f"{quality_text(value, quality)} {_unit(quality)} at the end of training.{_compressed(run, quality)}"
        )
    else:
        where = run.error or (f"the last metrics are of step {run.rows[-1]['step']}" if run.rows else "")
        sentences.append(f"{run.status.capitalize()}{f': {where}' if where else ''}.")
    checked = [(found, row["step"]) for row in run.rows if (found := number(row.get(quality.key))) is not None]
    if checked:
        best, step = (max if quality.better == "more" else min)(checked)
        sentences.append(
            f"The best validation on the way: {quality_text(best, quality)} {_unit(quality)} at step {step}."
        )
    return sentences


def _compressed(run: Run, quality: Measure) -> str:
    anchors = [(name, number(run.summary.get(key))) for name, key in (("gzip", "gzip_bpb"), ("xz", "xz_bpb"))]
    said = [f"{name} makes {found:.4f}" for name, found in anchors if found is not None and quality.unit == "bits/byte"]
    return f" Of the same text {' and '.join(said)}." if said else ""


def _compared(comparison: Comparison) -> list[str]:
    ranked, quality = comparison.ranked(), comparison.quality
    if not ranked:
        return ["No run has finished with a validation: there is nothing to compare."]
    best, of_best = ranked[0]
    said = f"{quality_text(of_best.mean, quality)} {_unit(quality)}{_seeds(of_best)}"
    if len(ranked) == 1:
        return [f"One point, {best.name}: {said}. There is nothing to compare it with."]
    others = list(zip(ranked[1:], differences(comparison)[1:], strict=True))
    sentences = [f"{best.name} is best: {said}.", _next(others[0][0][0], others[0][1], quality)]
    equal = [point for (point, _), apart in others if apart.none]
    if equal:
        sentences.append(
            f"No difference from the best: {some([point.name for point in equal])}.{_cheaper([best, *equal])}"
        )
        first = next(((point, apart) for (point, _), apart in others if not apart.none), None)
        if first is not None:
            sentences.append(
                f"The first that is worse by more than its pooled spread is {first[0].name}: {_by(first[1], quality)}."
            )
    if all(found.deviation is None for _, found in ranked):
        sentences.append(
            "Every point has one seed: how far seeds scatter is unknown, and nothing can be concluded about small"
            " differences. Repeat with several seeds (seed=0,1,2)."
        )
    elif single := [point.name for point, found in ranked if found.deviation is None]:
        sentences.append(f"One seed only: {some(single)}.")
    return sentences


def _lost(comparison: Comparison) -> str:
    counts = Counter(run.status for run in comparison.lost)
    return f"Not in the comparison: {', '.join(f'{count} {status}' for status, count in counts.most_common())}."


def _unit(measure: Measure) -> str:
    return {"share": measure.title, "nats/target": "nats per target"}.get(measure.unit, measure.title)


def _seeds(found: Spread) -> str:
    if found.deviation is None:
        return " (one seed)"
    return f" (mean of {found.n} seeds, standard deviation {found.deviation:.2g})"


def _by(apart: Difference, quality: Measure) -> str:
    size = quality_text(abs(apart.value), quality)
    return f"by {size}" if apart.within is None else f"by {size} against a spread of {apart.within:.2g}"


def _next(point: Point, apart: Difference, quality: Measure) -> str:
    if apart.value == 0:
        return f"Next is {point.name}, with the same figure."
    if apart.within is None:
        return f"Next is {point.name}, worse {_by(apart, quality)}."
    where = "within" if apart.none else "outside"
    size = quality_text(abs(apart.value), quality)
    return (
        f"Next is {point.name}, worse by {size}, which is {where} the pooled spread over seeds of {apart.within:.2g}."
    )


def _cheaper(points: list[Point]) -> str:
    """Which of points that are equally good costs least."""
    found = []
    for measure, word in ((SPEED, "fastest"), (CACHE, "smallest cache"), (FLOPS, "fewest FLOPs")):
        costs = [(spread.mean, point.name) for point in points if (spread := point.spread(measure)) is not None]
        if len({cost for cost, _ in costs}) > 1:
            name = (max if measure.better == "more" else min)(costs)[1]
            found.append(f"{word} {name}")
    return f" Of these: {', '.join(found)}." if found else ""

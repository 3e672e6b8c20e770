"""What a run or a comparison shows, in sentences, and what keeps it from being conclusive."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from hybridlm.report.comparison import DEVICE, Comparison, Configuration, device_of, identity
from hybridlm.report.metrics import CACHE, FLOPS, SPEED, TOKENS, Difference, Metric, difference, scale
from hybridlm.report.runs import Run, number, parsed_number

_WHOLE = 0.95  # of the training text; a run that has seen as much has seen all of it
_ALIKE = 0.01  # numbers of tokens closer than this are equal: the last step of a schedule is rounded
Settings = frozenset[tuple[str, str]]
_TOKENIZER = ("kind", "path", "vocab_size", "split")
_RATES = ("optim.lr", "optim.lr_scale.", "optim.muon.lr")


def differences(comparison: Comparison) -> list[Difference]:
    """Each ranked configuration's difference from the best one, which is the first."""
    spreads = [found for _, found in comparison.ranked()]
    return [difference(one, spreads[0], spreads) for one in spreads]


def verdict(comparison: Comparison) -> list[str]:
    """Which configuration is best, by how much, and whether seeds alone explain the difference."""
    counts = Counter(run.status for run in comparison.unfinished).most_common()
    unfinished = f"Not compared: {', '.join(f'{count} {status}' for status, count in counts)}."
    return [*_compared(comparison), *([unfinished] if counts else [])]


def _compared(comparison: Comparison) -> list[str]:
    ranked, quality = comparison.ranked(), comparison.quality
    if not ranked:
        return ["No run has finished with a validation, so there is nothing to compare."]
    best, found = ranked[0]
    figure = f"{quality.text(found.mean)} {unit_name(quality)} (one seed)"
    if found.std is not None:
        figure = figure.replace("one seed", f"mean of {found.n} seeds, standard deviation {found.std:.2g}")
    if len(ranked) == 1:
        return [f"A single configuration, {best.name}: {figure}. There is nothing to compare it with."]
    others = list(zip((one for one, _ in ranked[1:]), differences(comparison)[1:], strict=True))
    sentences = [f"{best.name} is best: {figure}.", _next(*others[0], quality)]
    if equal := [one for one, apart in others if apart.within_noise]:
        sentences.append(f"Not distinguishable from the best: {some(equal)}.{_cheaper([best, *equal])}")
        for one, apart in [pair for pair in others if not pair[1].within_noise][:1]:
            by = f"{quality.text(abs(apart.value))} against a spread of {apart.std:.2g}"
            sentences.append(f"The first that is worse by more than the pooled spread is {one.name}: by {by}.")
    single = [one for one, found in ranked if found.std is None]
    if len(single) == len(ranked):
        sentences.append(
            "Every configuration was run with one seed, so the variation between seeds is unknown and small differences"
            " are inconclusive. Repeat with several seeds (seed=0,1,2)."
        )
    elif single:
        sentences.append(f"Run with one seed only: {some(single)}.")
    return sentences


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
        best, step = (max if quality.better == "more" else min)(validations)
        sentences.append(
            f"The best validation during training: {quality.text(best)} {unit_name(quality)} at step {step}."
        )
    return sentences


def unit_name(metric: Metric) -> str:
    return "nats per target" if metric.unit == "nats/target" else metric.title


def _next(one: Configuration, apart: Difference, quality: Metric) -> str:
    if apart.value == 0:
        return f"Next is {one.name}, with the same value."
    spread = f", {'within' if apart.within_noise else 'outside'} the pooled spread over seeds of {apart.std or 0:.2g}"
    worse = f"Next is {one.name}, worse by {quality.text(abs(apart.value))}"
    return f"{worse}{'' if apart.std is None else spread}."


def _cheaper(equal: list[Configuration]) -> str:
    """Which of equally good configurations costs least."""
    found = []
    for metric, word in ((SPEED, "fastest"), (CACHE, "smallest decode cache"), (FLOPS, "fewest FLOPs")):
        costs = [(spread.mean, one.name) for one in equal if (spread := one.spread(metric)) is not None]
        if len({cost for cost, _ in costs}) > 1:
            found.append(f"{word} {(max if metric.better == 'more' else min)(costs)[1]}")
    return f" Of these: {', '.join(found)}." if found else ""


def cautions(comparison: Comparison) -> list[str]:
    """Why a ranking of small, short runs may not hold; for a single run only what concerns it."""
    found = _little_seen([run for one in comparison.tried for run in one.runs])
    if len(comparison.configurations) > 1:
        found += [*_unequal_lengths(comparison), *_learning_rates(comparison)]
    return found


def epochs(run: Run) -> float | None:
    """Passes over the training text at the last logged step; None for a generated task, or if nothing was logged."""
    logged = [found for row in run.rows if (found := number(row.get("data/epoch"))) is not None]
    return logged[-1] if logged and run.config.get("data.source") != "synthetic" else None


def percent(share: float) -> str:
    """With two digits if it is small."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def _little_seen(runs: list[Run]) -> list[str]:
    little = sorted(seen for run in runs if (seen := epochs(run)) is not None and seen < _WHOLE)
    if not little:
        return []
    text = f"{' to '.join(dict.fromkeys(map(percent, (little[0], little[-1]))))} of the training text"
    if len(runs) == 1:
        return [f"This run saw {text}; longer training (trainer.max_steps) is likely to give a better model."]
    who = "These runs" if len(little) == len(runs) else f"{len(little)} of these {len(runs)} runs"
    return [f"{who} saw {text}; the ranking may change with longer training."]


def _unequal_lengths(comparison: Comparison) -> Iterator[str]:
    tokens = [found.mean for one in comparison.configurations if (found := one.spread(TOKENS)) is not None]
    if tokens and max(tokens) > (1 + _ALIKE) * min(tokens):
        scaled = scale(tokens, "count")
        ends = f"{scaled.text(min(tokens))} to {scaled.text(max(tokens))} {scaled.unit}".strip()
        yield (
            f"The configurations were trained on different numbers of tokens ({ends}), which explains part of the"
            " differences."
        )


def _learning_rates(comparison: Comparison) -> Iterator[str]:
    """Whether each model was tuned: another learning rate may reverse the order."""
    rates: dict[Settings, dict[Settings, Configuration]] = defaultdict(dict)  # by other settings, by learning rates
    for one in comparison.tried:
        settings = identity(one.runs[0])
        own = frozenset(item for item in settings if item[0].startswith(_RATES))
        rates[settings - own].setdefault(own, one)
    single = [item for tried in rates.values() for item in tried.items() if len(tried) == 1]
    if len(single) == len(rates) > 1:
        yield _one_rate(single[0][1].runs[0], len({own for own, _ in single}) == 1)
    elif len(rates) > 1:
        if single:
            yield f"Only one learning rate was tried for {some([one for _, one in single])}."
        for column in comparison.tuned:
            if column.startswith(_RATES) and (edge := _at_the_edge(comparison, column)):
                yield f"The best {column} is at the edge of the range tried: {some(edge)}; extend it."


def _one_rate(first: Run, same: bool) -> str:
    field = "optim.muon.lr" if first.setting("optim.name") == "muon" else "optim.lr"
    value = parsed_number(first.setting(field) or "")
    tries = f"{field}={','.join(f'{value * factor:g}' for factor in (0.5, 1, 2))}" if value else field
    tried = "Each configuration was tried with one learning rate"
    if same:
        tried = f"All configurations used the same learning rate{f' ({field}={value:g})' if value else ''}"
    return f"{tried}; a better one may change the ranking. Try several for each ({tries}) and add --best-of {field}."


def _at_the_edge(comparison: Comparison, column: str) -> list[str]:
    """The configurations whose best rate is the smallest or largest one tried for them."""
    tried: dict[str, list[float]] = defaultdict(list)
    for one in comparison.tried:
        tried[comparison.name_of(one.settings, [column])].append(parsed_number(one.settings[column]) or math.nan)
    found = []
    for one in comparison.configurations:
        own, values = parsed_number(one.settings[column]), tried[comparison.name_of(one.settings, [column])]
        if len(set(values)) > 1 and own in (min(values), max(values)):
            found.append(f"{one.name} ({'smallest' if own == min(values) else 'largest'})")
    return found


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table has to know about its numbers."""
    runs = [run for one in comparison.tried for run in one.runs]
    by_text = [run for run in runs if run.setting("data.source") != "synthetic"]
    several = len({tuple(run.setting(f"data.tokenizer.{key}") for key in _TOKENIZER) for run in by_text}) > 1
    repeated = [one for one in comparison.tried if len({run.seed for run in one.runs}) < len(one.runs)]
    finite = [(one, mean.n if (mean := one.spread(comparison.quality)) else 0) for one in comparison.tried]
    diverged = [one for one, n in finite if n < len(one.runs)]
    devices = {device_of(run) for run in runs}
    threads = len(devices) == 1 and len({run.summary.get(DEVICE) for run in runs}) > 1
    shared = len(runs) > 1 and all(device_of(run).startswith("CPU") and run.job is None for run in runs)
    found: tuple[tuple[object, str], ...] = (
        (comparison.passed_over, _tuning(comparison)),
        (len(devices) > 1, "The runs used different devices: do not compare their speed, memory and time."),
        (threads, "The runs used different numbers of threads: do not compare their speed and time."),
        (several, "The runs have different tokenizers: compare bits per byte, not loss per token or tokens/s."),
        (repeated, f"The mean includes runs with the same seed: {some(repeated)}."),
        (diverged, f"Some run diverged (not a number) and is left out of the mean: {some(diverged)}."),
        (
            shared,
            "Memory on a CPU is that of the whole process: the jobs of one train.py -m share it, and it never shrinks"
            " between them.",
        ),
    )
    return [note for holds, note in found if holds]


def _tuning(comparison: Comparison) -> str:
    tried = []
    for column in comparison.tuned:
        values = {one.settings[column] for one in comparison.tried}
        tried.append(f"{column} ({', '.join(sorted(values, key=_by_size))})")
    return (
        f"Each model is shown at its best value of {'; '.join(tried)} by mean; values with which a run failed or"
        " diverged rank last. This favours models with more tries. The runs with other values,"
        f" {sum(len(one.runs) for one in comparison.passed_over)}, are in report.csv and listed below."
    )


def _by_size(text: str) -> tuple[bool, float, str]:
    value = parsed_number(text)
    return value is None, value or 0.0, text


def some(named: Sequence[Configuration | str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = [one if isinstance(one, str) else one.name for one in named[:most]]
    return "; ".join(names) + (f" and {len(named) - most} more" if len(named) > most else "")

"""What a comparison shows, in sentences, and what keeps it from being conclusive."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from hybridlm.report.comparison import DEVICE, Comparison, Configuration, device_of, identity
from hybridlm.report.metrics import CACHE, FLOPS, SPEED, TOKENS, Difference, Metric, Spread, difference, scale
from hybridlm.report.run_files import parsed_number
from hybridlm.report.runs import Run

_WHOLE = 0.95  # of the training text; a run that has seen as much has seen all of it
_ALIKE = 0.01  # numbers of tokens closer than this are equal: the last step of a schedule is rounded
Settings = frozenset[tuple[str, str]]
_RATES = ("optim.lr", "optim.lr_scale.", "optim.muon.lr")


def differences(comparison: Comparison) -> list[Difference]:
    """Each ranked configuration's difference from the best one, which is the first."""
    spreads = [found for _, found in comparison.ranked()]
    return [difference(one, spreads[0], spreads) for one in spreads]


def verdict(comparison: Comparison) -> list[str]:
    """Which configuration is best, by how much, and whether seeds alone explain the difference."""
    if not comparison.unfinished:
        return _compared(comparison)
    counts = Counter(run.status for run in comparison.unfinished).most_common()
    return [*_compared(comparison), f"Not compared: {', '.join(f'{count} {status}' for status, count in counts)}."]


def _compared(comparison: Comparison) -> list[str]:
    ranked, quality = comparison.ranked(), comparison.quality
    if not ranked:
        return ["No run has finished with a validation, so there is nothing to compare."]
    best, best_spread = ranked[0]
    figure = f"{quality.text(best_spread.mean)} {unit_name(quality)}{_seeds(best_spread)}"
    if len(ranked) == 1:
        return [f"A single configuration, {best.name}: {figure}. There is nothing to compare it with."]
    others = list(zip((one for one, _ in ranked[1:]), differences(comparison)[1:], strict=True))
    sentences = [f"{best.name} is best: {figure}.", _next(*others[0], quality)]
    equal = [one for one, apart in others if apart.within_noise]
    if equal:
        sentences.append(f"Not distinguishable from the best: {some(equal)}.{_cheaper([best, *equal])}")
        worse = next(((one, apart) for one, apart in others if not apart.within_noise), None)
        if worse is not None:
            by = f"{quality.text(abs(worse[1].value))} against a spread of {worse[1].std:.2g}"
            sentences.append(f"The first that is worse by more than the pooled spread is {worse[0].name}: by {by}.")
    single = [one for one, found in ranked if found.std is None]
    if len(single) == len(ranked):
        sentences.append(
            "Every configuration was run with one seed, so the variation between seeds is unknown and small differences"
            " are inconclusive. Repeat with several seeds (seed=0,1,2)."
        )
    elif single:
        sentences.append(f"Run with one seed only: {some(single)}.")
    return sentences


def unit_name(metric: Metric) -> str:
    return "nats per target" if metric.unit == "nats/target" else metric.title


def _seeds(found: Spread) -> str:
    return " (one seed)" if found.std is None else f" (mean of {found.n} seeds, standard deviation {found.std:.2g})"


def _next(one: Configuration, apart: Difference, quality: Metric) -> str:
    if apart.value == 0:
        return f"Next is {one.name}, with the same value."
    worse = f"Next is {one.name}, worse by {quality.text(abs(apart.value))}"
    if apart.std is None:
        return f"{worse}."
    return f"{worse}, {'within' if apart.within_noise else 'outside'} the pooled spread over seeds of {apart.std:.2g}."


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
    found = [_little_seen([run for one in comparison.tried for run in one.runs])]
    if len(comparison.configurations) > 1:
        found += [_unequal_lengths(comparison), *_learning_rates(comparison)]
    return [sentence for sentence in found if sentence]


def epochs(run: Run) -> float | None:
    """Passes over the training text at the last logged step; None for a generated task, or if nothing was logged."""
    return None if run.config.get("data.source") == "synthetic" else run.latest("data/epoch")


def percent(share: float) -> str:
    """With two digits if it is small."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def _little_seen(runs: list[Run]) -> str:
    little = sorted(seen for run in runs if (seen := epochs(run)) is not None and seen < _WHOLE)
    if not little:
        return ""
    shares = dict.fromkeys(map(percent, (little[0], little[-1])))
    text = f"{' to '.join(shares)} of the training text"
    if len(runs) == 1:
        return f"This run saw {text}; longer training (trainer.max_steps) is likely to give a better model."
    who = "These runs" if len(little) == len(runs) else f"{len(little)} of these {len(runs)} runs"
    return f"{who} saw {text}; the ranking may change with longer training."


def _unequal_lengths(comparison: Comparison) -> str:
    tokens = [found.mean for one in comparison.configurations if (found := one.spread(TOKENS)) is not None]
    if not tokens or max(tokens) <= (1 + _ALIKE) * min(tokens):
        return ""
    scaled = scale(tokens, "count")
    ends = f"{scaled.text(min(tokens))} to {scaled.text(max(tokens))} {scaled.unit}".strip()
    return (
        f"The configurations were trained on different numbers of tokens ({ends}), which explains part of the"
        " differences."
    )


def _learning_rates(comparison: Comparison) -> list[str]:
    """Whether each model was tuned: another learning rate may reverse the order."""
    rates: dict[Settings, dict[Settings, Configuration]] = defaultdict(dict)  # by other settings, by learning rates
    for one in comparison.tried:
        settings = identity(one.runs[0])
        own = frozenset(item for item in settings if item[0].startswith(_RATES))
        rates[settings - own].setdefault(own, one)
    if len(rates) < 2:
        return []
    single = [next(iter(tried.values())) for tried in rates.values() if len(tried) == 1]
    if len(single) == len(rates):
        return [_one_rate(single, len({next(iter(tried)) for tried in rates.values()}) == 1)]
    untuned = [f"Only one learning rate was tried for {some(single)}."] if single else []
    tuned = [column for column in comparison.tuned if column.startswith(_RATES)]
    return untuned + [sentence for column in tuned if (sentence := _best_at_the_edge(comparison, column))]


def _one_rate(configurations: list[Configuration], same: bool) -> str:
    first = configurations[0].runs[0]
    field = "optim.muon.lr" if first.setting("optim.name") == "muon" else "optim.lr"
    value = parsed_number(first.setting(field) or "")
    tries = f"{field}={','.join(f'{value * factor:g}' for factor in (0.5, 1, 2))}" if value else field
    tried = "Each configuration was tried with one learning rate"
    if same:
        tried = f"All configurations used the same learning rate{f' ({field}={value:g})' if value else ''}"
    return f"{tried}; a better one may change the ranking. Try several for each ({tries}) and add --best-of {field}."


def _best_at_the_edge(comparison: Comparison, column: str) -> str:
    """Names the configurations whose best rate is the smallest or largest one tried for them."""
    place, found = comparison.columns.index(column), []
    tried: dict[str, list[float]] = defaultdict(list)
    for one in comparison.tried:
        tried[comparison.name_of(one.settings, [column])].append(parsed_number(one.settings[place]) or math.nan)
    for one in comparison.configurations:
        own, values = parsed_number(one.settings[place]), tried[comparison.name_of(one.settings, [column])]
        if len(set(values)) > 1 and own in (min(values), max(values)):
            found.append(f"{one.name} ({'smallest' if own == min(values) else 'largest'})")
    return f"The best {column} is at the edge of the range tried: {some(found)}; extend it." if found else ""


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table has to know about its numbers."""
    runs = [run for one in comparison.tried for run in one.runs]
    found = [_tuning(comparison)] if comparison.passed_over else []
    if len({device_of(run) for run in runs}) > 1:
        found.append("The runs used different devices: do not compare their speed, memory and time.")
    elif len({run.summary.get(DEVICE) for run in runs}) > 1:
        found.append("The runs used different numbers of threads: do not compare their speed and time.")
    tokenizers = {
        tuple(run.setting(f"data.tokenizer.{key}") for key in ("kind", "path", "vocab_size"))
        for run in runs
        if run.setting("data.source") != "synthetic"
    }
    if len(tokenizers) > 1:
        found.append("The runs have different tokenizers: compare bits per byte, not loss per token or tokens/s.")
    if again := [one for one in comparison.tried if len({run.seed for run in one.runs}) < len(one.runs)]:
        found.append(f"The mean includes runs with the same seed: {some(again)}.")
    spreads = [(one, one.spread(comparison.quality)) for one in comparison.tried]
    if diverged := [one for one, mean in spreads if mean is None or mean.n < len(one.runs)]:
        found.append(f"Some run diverged (not a number) and is left out of the mean: {some(diverged)}.")
    if len(runs) > 1 and all(device_of(run).startswith("CPU") and run.job is None for run in runs):
        found.append(
            "Memory on a CPU is that of the whole process: the jobs of one train.py -m share it, and it never shrinks"
            " between them."
        )
    return found


def _tuning(comparison: Comparison) -> str:
    tried = []
    for column in comparison.tuned:
        values = {one.settings[comparison.columns.index(column)] for one in comparison.tried}
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

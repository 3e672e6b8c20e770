"""Changes that make a run fit, to be pasted into its command line, the fastest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from hybridlm.config.groups import root
from hybridlm.config.load import leaves, load_config, put
from hybridlm.config.overrides import key_of
from hybridlm.errors import UserError
from hybridlm.machine.device import CPU
from hybridlm.memory.plan import Plan, Planner

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig

WANTED = 3
_Values = tuple[tuple[str, ...], dict[tuple[str, ...], Any]]  # overrides, and their values by path
_SHORTEST, _FEWEST_IDS = 128, 4096  # sequences and vocabularies that are worth training with
_SMALLEST, _PAIRS = 3, 8  # sizes below the present one, and pairs of changes, to try


@dataclass(frozen=True)
class Change:
    """overrides: of the command line; config: with them; values: theirs, by path."""

    overrides: tuple[str, ...]
    config: RunConfig
    same_model: bool  # and the same sequence length
    values: Mapping[tuple[str, ...], Any]


@dataclass(frozen=True)
class Suggestion:
    """A change with which the run fits. reserved_bytes: at least, with the margin; tokens_per_s: estimated, None:
    unknown; relative_time: of a step."""

    change: Change
    reserved_bytes: int
    tokens_per_s: float | None
    relative_time: float


def suggestions(config: RunConfig, plan: Plan) -> list[Suggestion]:
    """Up to three changes that fit: those that keep the model and its sequence length by estimated tokens per second,
    then the others from the smallest change on.

    Changes are tried one by one, in the order of ``_singles``, then in pairs, until three fit.
    """
    singles = _singles(config, plan)
    found = list(islice(_fitting(singles), WANTED))
    fitting = [item.change for item in found]
    others = [change for change in singles if change not in fitting]
    found += islice(_fitting(islice(_pairs(config, others), _PAIRS)), WANTED - len(found))
    same = [item for item in found if item.change.same_model]
    same.sort(key=lambda item: -(item.tokens_per_s or 1 / item.relative_time))
    return same + [item for item in found if not item.change.same_model]


def _fitting(changes: Iterable[Change]) -> Iterator[Suggestion]:
    """Those that fit. Finding out takes some tenths of a second each, so no more are tried than are taken."""
    for change in changes:
        if (rough := Planner(change.config).rough()) is not None:
            yield Suggestion(change, *rough)


def _singles(config: RunConfig, plan: Plan) -> list[Change]:
    """Single changes, those that keep the model first."""
    gpu, precision, optim, trainer = plan.device != CPU, plan.precision, config.optim.name, config.trainer
    length, ids = config.data.seq_len, config.data.tokenizer.vocab_size
    fixed = {
        "data.batch_size": config.data.batch_size,
        "trainer.accumulate": trainer.accumulate,
        "trainer.checkpoint_blocks": trainer.checkpoint_blocks,
        "trainer.loss_rows": trainer.loss_rows,
    }
    freed = {name: "auto" for name, value in fixed.items() if value != "auto"}  # what the plan could choose
    tried: list[tuple[object, bool, _Values]] = [
        (freed, True, _fields(freed)),
        (gpu and optim != "adamw8bit", True, _option("optim", "adamw8bit")),
        # Muon copies all its matrices during an update.
        *((optim == "muon", True, _option("optim", name)) for name in ("adamw", "lion")),
        (gpu and precision in ("32-true", "64-true"), True, _fields({"trainer.precision": "bf16-mixed"})),
        (
            precision in ("bf16-mixed", "32-true") and trainer.strategy != "fsdp2",
            True,
            _fields({"trainer.precision": "bf16-true"}),
        ),
        (config.callbacks.ema.decay is not None, True, _fields({"callbacks.ema.decay": None})),
        *((shorter >= _SHORTEST, False, _fields({"data.seq_len": shorter})) for shorter in (length // 2, length // 4)),
        (
            plan.vocabulary.bound and ids // 2 >= _FEWEST_IDS,
            False,
            _fields({"data.tokenizer.vocab_size": ids // 2}),
        ),
        *((True, False, _option("size", name)) for name in _smaller_sizes(config)),
    ]
    return [change for asked, same, values in tried if asked for change in _valid(config, *values, same)]


def _smaller_sizes(config: RunConfig) -> list[str]:
    """The next smaller sizes that the preset takes, the largest first."""
    own = len(config.model.layers) * config.model.d_model**2
    weights = {}
    for name in config.model.sizes:
        shape = dict(_option("size", name)[1])
        weights[name] = shape.get(("model", "n_layers"), 0) * shape.get(("model", "d_model"), 0) ** 2
    smaller = [name for name in sorted(weights, key=lambda name: -weights[name]) if 0 < weights[name] < own]
    return smaller[:_SMALLEST]


def _option(group: str, option: str) -> _Values:
    """``group=option``: the values of its file, with numbers read as Hydra does (3e-3 is one)."""
    tree = OmegaConf.to_container(OmegaConf.load(root() / "conf" / group / f"{option}.yaml"))
    section = () if group == "size" else (group,)
    return (f"{group}={option}",), {(*section, *path): value for path, value in leaves(tree) if path != ("defaults",)}


def _fields(fields: Mapping[str, object]) -> _Values:
    """Fields by dotted name."""
    words = tuple(f"{name}={'null' if value is None else value}" for name, value in fields.items())
    return words, {tuple(name.split(".")): value for name, value in fields.items()}


def _valid(
    config: RunConfig, words: tuple[str, ...], values: Mapping[tuple[str, ...], Any], same_model: bool
) -> Iterator[Change]:
    """The change, unless the configuration becomes invalid."""
    tree = config.model_dump()
    for path, value in values.items():
        put(tree, path, value)
    with suppress(UserError):
        yield Change(words, load_config(tree), same_model, values)


def _pairs(config: RunConfig, tried: list[Change]) -> Iterator[Change]:
    """Two changes of different fields at once."""
    for first, second in combinations(tried, 2):
        if not {key_of(word) for word in first.overrides} & {key_of(word) for word in second.overrides}:
            words, same = (*first.overrides, *second.overrides), first.same_model and second.same_model
            yield from _valid(config, words, {**first.values, **second.values}, same)

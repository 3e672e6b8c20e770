"""Changes that make a run fit, to be pasted into its command line, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from hybridlm.config.groups import root
from hybridlm.config.load import load_config
from hybridlm.errors import UserError
from hybridlm.machine.device import CPU
from hybridlm.machine.profiles import planned_device
from hybridlm.memory.optimizer import minimum_bytes
from hybridlm.memory.plan import Plan, Planner, workload_of

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig

WANTED = 3
_SHORTEST, _FEWEST_IDS = 128, 4096  # sequences and vocabularies that are worth training with
_SMALLEST, _PAIRS = 3, 8  # sizes below the present one, and pairs of changes, to try


@dataclass(frozen=True)
class Change:
    """overrides: of the command line; config: with them; values: theirs, nested."""

    overrides: tuple[str, ...]
    config: RunConfig
    same_model: bool  # and the same sequence length
    values: dict[str, Any]


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
    singles = list(_singles(config, plan))
    found = _fitting(singles, WANTED, plan)
    if len(found) < WANTED:
        tried = [change for change in singles if all(change is not suggestion.change for suggestion in found)]
        found += _fitting(_pairs(config, tried)[:_PAIRS], WANTED - len(found), plan)
    same = [item for item in found if item.change.same_model]
    others = [item for item in found if not item.change.same_model]
    return sorted(same, key=lambda item: -(item.tokens_per_s or 1 / item.relative_time)) + others


def _fitting(changes: list[Change], enough: int, plan: Plan) -> list[Suggestion]:
    """Tracing a step takes some tenths of a second: changes whose weights alone do not fit are skipped."""
    found: list[Suggestion] = []
    for change in changes:
        if len(found) == enough:
            break
        if plan.devices == 1 and plan.limit_bytes is not None and _standing(change.config) > plan.limit_bytes:
            continue
        if (rough := Planner.of(change.config).rough(change.config)) is not None:
            found.append(Suggestion(change, *rough))
    return found


def _standing(config: RunConfig) -> int:
    return minimum_bytes(workload_of(config, planned_device(config.hardware))[0])


def _singles(config: RunConfig, plan: Plan) -> Iterator[Change]:
    """Single changes, those that keep the model first."""
    freed = _freed(config)
    if freed:
        yield from _change(config, freed, same_model=True)
    if plan.device != CPU and config.optim.name != "adamw8bit":
        yield from _group(config, "optim", "adamw8bit", same_model=True)
    for name in ("adamw", "lion"):  # Muon copies all its matrices during an update
        if config.optim.name == "muon":
            yield from _group(config, "optim", name, same_model=True)
    if plan.precision in ("32-true", "64-true") and plan.device != CPU:
        yield from _change(config, {"trainer.precision": "bf16-mixed"}, same_model=True)
    if plan.precision in ("bf16-mixed", "32-true") and config.trainer.strategy != "fsdp2":
        yield from _change(config, {"trainer.precision": "bf16-true"}, same_model=True)
    if config.callbacks.ema.decay is not None:
        yield from _change(config, {"callbacks.ema.decay": None}, same_model=True)
    length = config.data.seq_len
    for shorter in (length // 2, length // 4):
        if shorter >= _SHORTEST:
            yield from _change(config, {"data.seq_len": shorter}, same_model=False)
    ids = config.data.tokenizer.vocab_size
    if plan.vocabulary.bound and ids // 2 >= _FEWEST_IDS:
        yield from _change(config, {"data.tokenizer.vocab_size": ids // 2}, same_model=False)
    yield from _sizes(config)


def _freed(config: RunConfig) -> dict[str, object]:
    """What the user fixed and the plan could choose."""
    fixed = {
        "data.batch_size": config.data.batch_size,
        "trainer.accumulate": config.trainer.accumulate,
        "trainer.checkpoint_blocks": config.trainer.checkpoint_blocks,
        "trainer.loss_rows": config.trainer.loss_rows,
    }
    return {name: "auto" for name, value in fixed.items() if value != "auto"}


def _sizes(config: RunConfig) -> Iterator[Change]:
    """The next smaller sizes that the preset takes, the largest first."""
    own = len(config.model.layers) * config.model.d_model**2
    found = []
    for path in (root() / "conf/size").glob("*.yaml"):
        shape = _option(path).get("model", {})
        if path.stem in config.model.sizes and "d_model" in shape and shape["n_layers"] * shape["d_model"] ** 2 < own:
            found.append((shape["n_layers"] * shape["d_model"] ** 2, path.stem))
    for _, name in sorted(found, reverse=True)[:_SMALLEST]:
        yield from _group(config, "size", name, same_model=False)


def _option(path: Path) -> dict[str, Any]:
    """A file of a config group, with numbers read as Hydra does (3e-3 is one)."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))


def _group(config: RunConfig, group: str, option: str, *, same_model: bool) -> Iterator[Change]:
    """``group=option``: the values of its file over the configuration's."""
    tree = _option(root() / "conf" / group / f"{option}.yaml")
    parts = tree if group == "size" else {group: tree}
    yield from _loaded(config, parts, (f"{group}={option}",), same_model)


def _change(config: RunConfig, fields: Mapping[str, object], *, same_model: bool) -> Iterator[Change]:
    """Fields by dotted name."""
    parts: dict[str, Any] = {}
    for name, value in fields.items():
        *sections, last = name.split(".")
        inner = parts
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    words = tuple(f"{name}={'null' if value is None else value}" for name, value in fields.items())
    yield from _loaded(config, parts, words, same_model)


def _loaded(config: RunConfig, parts: Mapping[str, Any], words: tuple[str, ...], same_model: bool) -> Iterator[Change]:
    """The change, unless the configuration becomes invalid."""
    tree = config.model_dump()
    _merge(tree, parts)
    try:
        yield Change(words, load_config(tree), same_model, dict(parts))
    except UserError:
        return


def _merge(tree: dict[str, Any], parts: Mapping[str, Any]) -> None:
    for name, value in parts.items():
        if name == "defaults":
            continue
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def _pairs(config: RunConfig, tried: list[Change]) -> list[Change]:
    """Two changes of different fields at once."""
    found: list[Change] = []
    for first, second in combinations(tried, 2):
        if {word.partition("=")[0] for word in first.overrides} & {word.partition("=")[0] for word in second.overrides}:
            continue
        both = deepcopy(first.values)
        _merge(both, second.values)
        words, same = (*first.overrides, *second.overrides), first.same_model and second.same_model
        found += _loaded(config, both, words, same)
    return found

"""What would make a run fit that does not: changes to paste, those that keep most tokens per second first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from hybridlm.memory.plan import Ground, Plan, workload_of
from hybridlm.memory.updates import standing_bytes

if TYPE_CHECKING:
    from hybridlm.config.run import RunConfig

WANTED = 3
_SHORTEST, _FEWEST_IDS, _SMALLEST = (
    128,
    4096,
    3,
)  # windows, vocabularies that are worth a run; sizes tried below the present one
_PAIRS = 8  # tried at most


@dataclass(frozen=True)
class Change:
    """overrides: as they stand on a command line; config: with them."""

    overrides: tuple[str, ...]
    config: RunConfig
    same_model: bool  # trains the same model on the same windows


@dataclass(frozen=True)
class Suggestion:
    """A change with which the run fits. reserved_bytes: of its smallest cut, with the margin; tokens_per_s: estimated,
    None: unknown; relative_time: of a step."""

    change: Change
    reserved_bytes: int
    tokens_per_s: float | None
    relative_time: float


def suggestions(config: RunConfig, plan: Plan) -> list[Suggestion]:
    """Up to three changes that fit. Those that leave the model and its windows as they are stand first, most estimated
    tokens per second at the top; the others cost none, so that the smallest change of what is trained is at their top.

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
    """Following a step takes some tenths of a second: changes whose weights alone do not fit are left out before."""
    found: list[Suggestion] = []
    for change in changes:
        if len(found) == enough:
            break
        if plan.devices == 1 and plan.limit_bytes is not None and _standing(change.config) > plan.limit_bytes:
            continue
        if (rough := Ground.of(change.config).rough(change.config)) is not None:
            found.append(Suggestion(change, *rough))
    return found


def _standing(config: RunConfig) -> int:
    return standing_bytes(workload_of(config, planned_device(config.hardware))[0])


def _singles(config: RunConfig, plan: Plan) -> Iterator[Change]:
    """Changes of one thing, those that keep the model first."""
    freed = _freed(config)
    if freed:
        yield from _change(config, freed, same_model=True)
    if plan.device != CPU and config.optim.name != "adamw8bit":
        yield from _group(config, "optim", "adamw8bit", same_model=True)
    for name in ("adamw", "lion"):  # Muon holds a second copy of all its matrices while they move
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
    """A file of a group, its numbers read as Hydra reads them (3e-3 is one)."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))


def _group(config: RunConfig, group: str, option: str, *, same_model: bool) -> Iterator[Change]:
    """``group=option``: the values of its file over the configuration's."""
    tree = _option(root() / "conf" / group / f"{option}.yaml")
    parts = tree if group == "size" else {group: tree}
    yield from _loaded(config, parts, (f"{group}={option}",), same_model)


def _change(config: RunConfig, fields: Mapping[str, object], *, same_model: bool) -> Iterator[Change]:
    """Fields by their dotted names."""
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
    """The change, unless it clashes with something else in the configuration."""
    tree = config.model_dump()
    _merge(tree, parts)
    try:
        yield Change(words, load_config(tree), same_model)
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
    """Two changes at once that are of different fields, both over ``config``."""
    found = []
    for first, second in combinations(tried, 2):
        if {word.partition("=")[0] for word in first.overrides} & {word.partition("=")[0] for word in second.overrides}:
            continue
        tree = config.model_dump()
        for change in (first, second):
            _merge(tree, _difference(config.model_dump(), change.config.model_dump()))
        try:
            merged = load_config(tree)
        except UserError:
            continue
        found.append(Change((*first.overrides, *second.overrides), merged, first.same_model and second.same_model))
    return found


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of ``after`` that ``before`` has otherwise."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        old = before.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if inner := _difference(old, value):
                found[name] = inner
        elif value != old:
            found[name] = value
    return found

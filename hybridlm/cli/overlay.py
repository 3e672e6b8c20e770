"""A recorded configuration with new overrides on top. The record is plain values: Hydra sees the new overrides
alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from hybridlm.cli.composition import Composition, composed, config_dir, is_group
from hybridlm.config.groups import groups
from hybridlm.config.load import load_config
from hybridlm.config.overrides import CommandLine, key_of
from hybridlm.config.run import RunConfig

_ABSENT = object()


def overlaid(recorded: RunConfig, line: CommandLine) -> RunConfig:
    """``recorded`` as a (repaired) command line changes it.

    A field is set, or with ``~`` put back to its default. A group brings its section anew, and of other sections
    whatever its files change there. Raises ConfigError.
    """
    ours = [override for override in line.overrides if key_of(override).partition(".")[0] not in ("ckpt", "hydra")]
    ours = [override for override in ours if not key_of(override).startswith("hydra/")]
    tree: dict[str, Any] = recorded.model_dump()
    chosen = [override for override in ours if is_group(override, groups(config_dir(line)))]
    if chosen:
        plain, new = _defaults(line.flags), composed(CommandLine(line.flags, tuple(chosen)))
        named = {key_of(override).partition("@")[0] for override in chosen}
        named |= {group for group, option in new.choices.items() if plain.choices.get(group, _ABSENT) != option}
        for path, value in _leaves(new.tree):
            if _at(plain.tree, path) != value:
                _put(tree, path, value)
        for section in named & tree.keys():
            tree[section] = new.tree.get(section, {})
        if "model" in named:  # as it was before a match
            _put(tree, ("sweep", "matched"), None)
    if fields := [override for override in ours if override not in chosen]:
        new = composed(CommandLine(line.flags, tuple(ours)))
        for override in fields:
            path = tuple(key_of(override).split("."))
            if override.startswith("~"):
                _drop(tree, path)
            else:
                _put(tree, path, _at(new.tree, path))
    return load_config(tree)


@cache
def _defaults(flags: tuple[str, ...]) -> Composition:
    return composed(CommandLine(flags, ()))


def _leaves(tree: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, tree


def _at(tree: object, path: tuple[str, ...]) -> object:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return _ABSENT
        tree = tree[name]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    """Mappings are merged, as Hydra merges them."""
    name, *rest = path
    if rest:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        _put(tree[name], tuple(rest), value)
    elif isinstance(value, Mapping) and isinstance(tree.get(name), dict):
        for key, inner in value.items():
            _put(tree[name], (str(key),), inner)
    elif value is not _ABSENT:
        tree[name] = value


def _drop(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    parent = _at(tree, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)

"""A recorded configuration with new overrides on top. The record is plain values: Hydra sees the new overrides
alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridlm.cli.compose import Composition, composed, config_dir
from hybridlm.config.groups import groups
from hybridlm.config.load import leaves, load_config
from hybridlm.config.overrides import CommandLine, is_group, key_of
from hybridlm.config.run import RunConfig

_ABSENT = object()


def overlaid(recorded: RunConfig, line: CommandLine, new: Composition) -> RunConfig:
    """``recorded`` as a (repaired) command line changes it; ``new`` is what the line composes.

    A field is set, or with ``~`` reset to its default. A group replaces its whole section, and in other sections
    whatever its files change. Raises ConfigError.
    """
    ours = [override for override in line.overrides if _section_of(override) not in ("ckpt", "hydra")]
    tree: dict[str, Any] = recorded.model_dump()
    chosen = [override for override in ours if is_group(override, groups(config_dir(line)))]
    if chosen:
        plain = composed(CommandLine(line.flags, ()))
        named = {key_of(override).partition("@")[0] for override in chosen}
        named |= {group for group, option in new.choices.items() if plain.choices.get(group, _ABSENT) != option}
        for path, value in leaves(new.tree):
            if _at(plain.tree, path) != value:
                _put(tree, path, value)
        for section in named & tree.keys():
            tree[section] = new.tree.get(section, {})
        if "model" in named:  # a new model has not been matched yet
            _put(tree, ("sweep", "matched"), None)
    for override in ours:
        path = tuple(key_of(override).split("."))
        if override in chosen:
            continue
        if override.startswith("~"):
            _drop(tree, path)
        else:
            _put(tree, path, _at(new.tree, path))
    return load_config(tree)


def _section_of(override: str) -> str:
    """The part of the key before the first dot or slash."""
    return key_of(override).partition(".")[0].partition("/")[0]


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

"""A recorded configuration with new overrides on top. The record is plain values: Hydra sees the new overrides
alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm.cli.compose import Composition, composed, config_dir
from hybridlm.config.groups import groups
from hybridlm.config.load import leaves, load_config, put
from hybridlm.config.overrides import CommandLine, is_group, key_of
from hybridlm.config.run import RunConfig

_ABSENT = object()


def overlaid(recorded: RunConfig, line: CommandLine, new: Composition) -> RunConfig:
    """``recorded`` as a (repaired) command line changes it; ``new`` is what the line composes.

    A field is set, or with ``~`` reset to its default. A group replaces its whole section, and in other sections
    whatever its files change. Raises ConfigError.
    """
    known = groups(config_dir(line))
    ours = [override for override in line.overrides if re.split("[./]", key_of(override))[0] not in ("ckpt", "hydra")]
    tree: dict[str, Any] = recorded.model_dump()
    chosen = {key_of(override).partition("@")[0] for override in ours if is_group(override, known)}
    if chosen:
        plain = composed(CommandLine(line.flags, ()))
        chosen |= {group for group, option in new.choices.items() if plain.choices.get(group, _ABSENT) != option}
        for path, value in leaves(new.tree):
            if _at(plain.tree, path) != value:
                put(tree, path, value)
        tree |= {section: new.tree.get(section, {}) for section in chosen & tree.keys()}
        if "model" in chosen:  # a new model has not been matched yet
            put(tree, ("sweep", "matched"), None)
    for override in ours:
        *sections, name = key_of(override).split(".")
        value = _at(new.tree, (*sections, name))
        if override.startswith("~"):
            parent = _at(tree, sections)
            if isinstance(parent, dict):
                parent.pop(name, None)
        elif not is_group(override, known) and value is not _ABSENT:
            put(tree, (*sections, name), value)
    return load_config(tree)


def _at(tree: object, path: Sequence[str]) -> object:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return _ABSENT
        tree = tree[name]
    return tree

"""A recorded configuration with new overrides on top. The record is plain values: Hydra sees the new overrides
alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hybridlm.cli.compose import Composition, composed, config_dir
from hybridlm.config.groups import groups
from hybridlm.config.load import leaves, load_config, put
from hybridlm.config.overrides import CommandLine, is_group, key_of
from hybridlm.config.run import RunConfig
from hybridlm.data.chat import missing_tokens
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer
from hybridlm.runs.initial import source_of

_ABSENT = object()
_PER_START = ("ckpt", "hydra", "init_from")


def new_config(line: CommandLine, new: Composition) -> RunConfig:
    """The configuration of a new run; ``new`` is what the (repaired) command line composes.

    With ``init_from`` the model and the tokenizer are those of the weights, the special tokens of conversations added
    where they are needed, and what the line says about the model must describe the same. Raises ConfigError; UserError:
    there are no such weights.
    """
    name = new.tree.get("init_from")
    if not isinstance(name, str):
        return load_config(new.tree)
    source, plain = source_of(name), load_config(composed(CommandLine(line.flags, ())).tree)
    tokens = plain.data.tokenizer.model_copy(
        update={"kind": "file", "path": str(source.folder.tokenizer), "special_tokens": ()}
    )
    data = plain.data.model_copy(update={"tokenizer": tokens})
    begun = {"init_from": str(source.checkpoint), "model": source.model, "data": data}
    config = _conversing(overlaid(plain.model_copy(update=begun), line, new), source.folder.tokenizer)
    source.refuse(config.model)
    return config


def _conversing(config: RunConfig, given: Path) -> RunConfig:
    """``config`` with the special tokens that the ``given`` tokenizer lacks for conversations, if there are any, and
    room in the model for these and for those that the line names."""
    settings = config.data.tokenizer
    if settings.path != str(given):
        return config
    if config.data.has_conversations and not settings.special_tokens:
        settings = settings.model_copy(update={"special_tokens": missing_tokens(Tokenizer.load(given))})
    if not settings.special_tokens:
        return config
    ids, fixed = load_tokenizer(given, settings.special_tokens).vocab_size, config.model.vocab_size
    model = config.model if fixed is None or fixed >= ids else config.model.model_copy(update={"vocab_size": ids})
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update={"tokenizer": settings})})


def overlaid(recorded: RunConfig, line: CommandLine, new: Composition) -> RunConfig:
    """``recorded`` as a (repaired) command line changes it; ``new`` is what the line composes.

    A field is set, or with ``~`` reset to its default. A group replaces its whole section, and in other sections
    whatever its files change. Weights to start from stay the recorded ones, and so does their tokenizer unless the line
    names one. Raises ConfigError.
    """
    known = groups(config_dir(line))
    ours = [override for override in line.overrides if re.split("[./]", key_of(override))[0] not in _PER_START]
    tree: dict[str, Any] = recorded.model_dump()
    chosen = {key_of(override).partition("@")[0] for override in ours if is_group(override, known)}
    if chosen:
        plain = composed(CommandLine(line.flags, ()))
        chosen |= {group for group, option in new.choices.items() if plain.choices.get(group, _ABSENT) != option}
        for path, value in leaves(new.tree):
            if _at(plain.tree, path) != value:
                put(tree, path, value)
        tree |= deepcopy({section: new.tree.get(section, {}) for section in chosen & tree.keys()})
        if "model" in chosen:  # a new model has not been matched yet
            put(tree, ("sweep", "matched"), None)
    if recorded.init_from is not None:
        keys = {key_of(override) for override in ours} - {"data.tokenizer.special_tokens"}
        named = any(key.startswith("data.tokenizer") for key in keys)
        tokenizer = _at(new.tree, ("data", "tokenizer")) if named else recorded.data.tokenizer.model_dump()
        tree["init_from"], tree["data"]["tokenizer"] = recorded.init_from, tokenizer
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

"""From a tree of plain values, or the text of a config.yaml, to a validated ``RunConfig``, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from hybridlm.config.constraints import constraint_problems
from hybridlm.config.model import ModelConfig
from hybridlm.config.problems import validate
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.plain import Unreadable, parse_yaml


def load_config(tree: Mapping[str, object]) -> RunConfig:
    """The configuration of a run from plain mappings, lists, texts and numbers.

    Raises:
        ConfigError: one line for each problem. Unknown keys, types and ranges are reported together; rules between
            fields (also together) once every field is valid.
    """
    config = validate(RunConfig, _plain_mapping(tree))
    if problems := constraint_problems(config):
        raise ConfigError(problems)
    return config


def validate_model(tree: Mapping[str, object]) -> ModelConfig:
    """The model section alone, as a checkpoint holds it. Raises ConfigError; so does its ``layers``."""
    return validate(ModelConfig, _plain_mapping(tree), "model")


def to_yaml(config: RunConfig) -> str:
    """YAML text that ``from_yaml`` reads back to an equal configuration."""
    return yaml.safe_dump(_plain(config.model_dump()), sort_keys=False, allow_unicode=True, width=140)


def from_yaml(text: str, *, rules: bool = True) -> RunConfig:
    """The configuration in the text of a config.yaml, which may be a stranger's. rules: False checks each field by
    itself only. Raises UserError: the text is not a plain YAML mapping within limits; ConfigError: a wrong field."""
    try:
        tree = parse_yaml(text)
    except Unreadable as error:
        raise UserError(f"config.yaml: {error}") from None
    if not isinstance(tree, Mapping):
        raise UserError("config.yaml: expected a mapping of sections")
    return load_config(tree) if rules else validate(RunConfig, _plain_mapping(tree))


def leaves(tree: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """The path and value of everything in ``tree`` that is not a filled mapping."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    else:
        yield path, tree


def put(tree: dict[str, Any], path: Sequence[str], value: object) -> None:
    """Sets what is at ``path``; mappings are merged, as Hydra merges them."""
    name, *rest = path
    inner = tree.get(name)
    if rest:
        tree[name] = inner = inner if isinstance(inner, dict) else {}
        put(inner, rest, value)
    elif isinstance(value, Mapping) and isinstance(inner, dict):
        for key, part in value.items():
            put(inner, (str(key),), part)
    else:
        tree[name] = value


def _plain(value: object) -> object:
    """Mappings with text keys and lists, all the way down; YAML knows no tuples, and its keys may be numbers."""
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _plain_mapping(tree: Mapping[str, object]) -> dict[str, object]:
    return {str(key): _plain(value) for key, value in tree.items()}

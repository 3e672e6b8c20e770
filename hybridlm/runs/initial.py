"""What ``init_from=`` means: the weights a new run starts from, and the architecture they belong to. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import get_annotations
from pathlib import Path

from hybridlm.config.load import validate_model
from hybridlm.config.model import ModelConfig
from hybridlm.errors import ConfigError, UserError
from hybridlm.files.home import expanded
from hybridlm.files.plain import Unreadable, read_yaml
from hybridlm.runs.resume import model_changes
from hybridlm.runs.run_folder import RunFolder, find_run

_AROUND_LAYERS = {"d_model", *get_annotations(ModelConfig)}  # and what ModelConfig itself declares, not its layers
NOT_IN_A_SWEEP = (
    "init_from: in a sweep `last` and `best` would mean one of its own jobs; name a run folder or a checkpoint"
)
_INERT = ("name", "sizes", "init")


@dataclass(frozen=True)
class Source:
    """A checkpoint, or weights alone, in ``folder``, whose config.yaml describes ``model``."""

    checkpoint: Path
    folder: RunFolder
    model: ModelConfig

    def refuse(self, model: ModelConfig) -> None:
        """ConfigError: ``model`` is of another architecture."""
        if changes := architecture_changes(self.model, model):
            raise ConfigError(
                f"init_from = {self.checkpoint}: has another architecture than this run; {', '.join(changes)}; without"
                " model and size the run takes that of the weights"
            )


def source_of(name: str) -> Source:
    """What ``init_from=name`` starts from: ``find_run`` says which names there are. UserError: there are no such
    weights, or nothing beside them says which model they are of."""
    place = expanded(name)
    if (place / "config.json").is_file() and not RunFolder(place).is_run():
        raise UserError(
            f"init_from = {name}: a model of another program; make a run folder of it with `hybridlm import {name} OUT`"
            " and start from that (init_from=OUT)"
        )
    folder, named = find_run(name)
    folder = RunFolder(folder.path.absolute())
    try:
        content = read_yaml(folder.config)
        tree = content.get("model") if isinstance(content, Mapping) else None
        if not isinstance(tree, Mapping):
            raise UserError("it has no model section")
        model = validate_model(tree)
        _ = model.layers
    except (Unreadable, UserError) as error:
        raise UserError(f"{folder.config}: {error}") from None
    return Source((named or folder.newest_checkpoint()).absolute(), folder, model)


def architecture_changes(old: ModelConfig, new: ModelConfig) -> list[str]:
    """The fields, old -> new, in which two models differ that do not compute the same from the same weights."""
    inert = {name: getattr(new, name) for name in _INERT}
    if old.vocab_size is not None and new.vocab_size is not None and new.vocab_size > old.vocab_size:
        inert["vocab_size"] = new.vocab_size  # the embedding grows
    changes = model_changes(old.model_copy(update=inert), new)
    if old.layers != new.layers:
        return changes
    return [line for line in changes if line.partition(":")[0].removeprefix("model.") in _AROUND_LAYERS]

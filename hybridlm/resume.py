"""What ``ckpt=`` on the command line means: which run goes on, and with which overrides."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridlm.command_line import key_of, merged, value_of
from hybridlm.config.load import from_yaml
from hybridlm.config.problems import show
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.files.checksum import damage
from hybridlm.run_folder import RunFolder, find_run, newest_run, run_of


@dataclass(frozen=True)
class Resume:
    """A run that goes on: its folder, the checkpoint it starts from, and its overrides with the new ones behind them."""

    folder: RunFolder
    checkpoint: Path
    overrides: tuple[str, ...]


def plan_resume(overrides: Sequence[str]) -> Resume | None:
    """The run that ``ckpt=`` among the (repaired) overrides names, or None where a run starts anew.

    Raises:
        ConfigError: there is nothing to resume (``ckpt=auto`` starts anew instead), or what there is, is damaged. ``last`` and ``auto``
            pass over a damaged newest checkpoint; one that is named is refused.
    """
    ckpt = value_of(overrides, "ckpt")
    if ckpt is None or ckpt.lower() in ("null", ""):
        return None
    named = value_of(overrides, "hydra.run.dir")
    if ckpt in ("last", "auto"):
        folder = RunFolder(Path(named).absolute()) if named else newest_run(Path.cwd())
        if ckpt == "auto" and (folder is None or not folder.step_checkpoints()):
            return None
        if folder is None:
            folder, checkpoint = find_run("last")
        else:
            checkpoint = run_of(folder.path).newest_checkpoint()
    else:
        folder, checkpoint = find_run(ckpt)
        if problem := damage(checkpoint):
            raise UserError(f"ckpt = {ckpt}: {problem}; ckpt=last takes the newest checkpoint that is whole")
        if named and Path(named).absolute().resolve() != folder.path.resolve():
            raise UserError(f"ckpt={ckpt} lies in {folder.path}, but hydra.run.dir={named}; a run is resumed in its own folder")
    kept = [line for line in overrides if key_of(line) not in ("ckpt", "hydra.run.dir")]
    own = [f"++ckpt={quoted(checkpoint)}", f"hydra.run.dir={quoted(folder.path)}"]
    return Resume(folder, checkpoint, (*merged(folder.overrides(), kept), *own))


def after_requeue(folder: RunFolder) -> Path | None:
    """The checkpoint that a job of SLURM goes on from when it was queued again; None: it is not, or had saved nothing yet."""
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < 1 or not folder.is_run():
        return None
    if not folder.step_checkpoints():
        folder.config.unlink()  # the folder is to be claimed anew
        return None
    return folder.newest_checkpoint()


def quoted(value: str | Path) -> str:
    """A text or a path as a value of Hydra's grammar, whatever characters it has."""
    text = value.as_posix() if isinstance(value, Path) else value  # the grammar reads the backslashes of Windows as escapes
    return "'" + text.replace("'", "\\'") + "'"


def refuse_other_model(folder: RunFolder, config: RunConfig) -> None:
    """Raise ConfigError with each field of the model section that differs from the run's config.yaml, old -> new."""
    try:
        old = from_yaml(folder.config.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError([f"{folder.config}: {problem}" for problem in error.problems]) from error
    before, after = dict(_leaves(old.model.model_dump(), "model")), dict(_leaves(config.model.model_dump(), "model"))
    changes = [
        f"{path}: {show(before.get(path))} -> {show(after.get(path))}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]
    if changes:
        raise UserError(f"{folder.path} cannot go on with another architecture; {', '.join(changes)}; start a new run without ckpt")


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    else:
        yield path, value

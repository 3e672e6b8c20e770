"""The run folder: the one place that knows the names of the files in it. Needs no torch."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from hybridlm.config.overrides import key_of
from hybridlm.errors import UserError
from hybridlm.files.checksum import damage
from hybridlm.files.durable import remove_partials, replaced
from hybridlm.files.folders import first_missing, refuse_links, remove_empty
from hybridlm.files.held import Held, Holding, holding
from hybridlm.files.home import expanded
from hybridlm.files.plain import Unreadable, parse_json, read_text, read_yaml

log = logging.getLogger(__name__)
_NAME = re.compile(r"(step|best)-(\d+)\.ckpt")
_NAME_AT_WANDB = r"[^/\\#?%:*\[\x00-\x1f\x7f]"  # the characters that W&B accepts, without glob patterns
_OF_WANDB = re.compile(
    rf"(?P<id>{_NAME_AT_WANDB}{{1,128}})\n"
    rf"((?P<project>{_NAME_AT_WANDB}{{0,128}})\n((?P<entity>{_NAME_AT_WANDB}{{0,128}})\n)?)?"
)
_SUPERSEDED = ".superseded"  # suffix of checkpoints after the step that a run was resumed from
# Written by `hybridlm sweep`: about one job, in its run folder; about all of them, in the folder above.
JOB, SWEEP = "job.json", "sweep.json"
_RUN_ROOTS = ("outputs", "multirun")
NEWEST = ("last", "best")  # names that mean the newest run
_METRICS_BYTES = 2**28
_NOT_RUNS = {".hydra", "wandb", "checkpoints"}  # folders inside a run that may hold a config.yaml of their own


class _Entry:
    """A file or folder of a fixed name in a run folder."""

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.path.joinpath(*self._parts)


@dataclass(frozen=True)
class RunFolder:
    """The folder ``path`` of one run."""

    path: Path

    config = _Entry("config.yaml")
    metrics_jsonl = _Entry("metrics.jsonl")
    metrics_csv = _Entry("metrics.csv")
    tokenizer = _Entry("tokenizer.json")
    chat_template = _Entry("chat_template.jinja")  # only if the run was trained on conversations
    checkpoints = _Entry("checkpoints")
    layers = _Entry("layers.txt")
    plan = _Entry("plan.txt")
    samples = _Entry("samples.txt")
    summary = _Entry("summary.json")
    evaluation = _Entry("eval.json")  # all results of `hybridlm eval`
    weights = _Entry("weights.safetensors")  # the final weights alone
    best_weights = _Entry("best.safetensors")
    lock = _Entry("train.lock")  # held by the process that trains in the folder
    log = _Entry("train.log")  # messages with time and level
    wandb_id = _Entry("wandb_id.txt")
    tensorboard = _Entry("tensorboard")
    recorded_overrides = _Entry(".hydra", "overrides.yaml")

    def samples_at(self, step: int) -> Path:
        """Text sampled during training, after ``step``."""
        return self.path / "samples" / f"step-{step:08d}.txt"

    def is_run(self) -> bool:
        return self.config.is_file()

    @contextmanager
    def training(self) -> Iterator[Holding]:
        """Holds the folder for this process to train in. UserError: another process is training in it, or it cannot be
        written."""
        with ExitStack() as stack:
            stack.callback(remove_empty, self.path, first_missing(self.path))
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                refuse_links(self.path)
                held = stack.enter_context(holding(self.lock))
            except Held as error:
                raise UserError(f"{self.path} is being trained by {error}") from None
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror or error}); choose another folder"
                    " (hydra.run.dir=...)"
                ) from None
            yield held

    def claim(self, config_text: str, *, anew: bool = False) -> None:
        """Claims the folder for this run by creating config.yaml in it. UserError: another run has claimed it before,
        unless ``anew`` is given and that run has saved nothing to resume from."""
        self.path.mkdir(parents=True, exist_ok=True)
        if anew and not self.resumable():
            self.rewrite_config(config_text)
            return
        try:
            with self.config.open("x", encoding="utf-8") as file:
                file.write(config_text)
        except FileExistsError:
            raise self.taken() from None

    def taken(self) -> UserError:
        """The error of a new run in a folder that already has one."""
        return UserError(
            f"{self.path} already contains a run; resume it with ckpt=auto, or choose another folder"
            " (hydra.run.dir=...)"
        )

    def rewrite_config(self, config_text: str) -> None:
        """Replaces config.yaml when a run is resumed with new settings; a crash leaves the old file or the new one."""
        with replaced(self.config) as new:
            new.write_text(config_text, encoding="utf-8")

    def step_checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def best_checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"best-{step:08d}.ckpt"

    def resumable(self) -> list[Path]:
        """The checkpoints to resume from, newest first: the step checkpoints; as long as there is none, those of the
        best validations."""
        return self.step_checkpoints() or self.best_checkpoints()

    def step_checkpoints(self) -> list[Path]:
        """The checkpoints of this run, newest (highest step) first."""
        return self._named("step")

    def best_checkpoints(self) -> list[Path]:
        """Those of the best validations, newest first."""
        return self._named("best")

    def best_checkpoint_kept(self) -> Path:
        """That of the best validation, by the metric that training ranks them by; the weights alone where the
        checkpoints are gone. UserError: there is neither."""
        found = self.best_checkpoints()
        if len(found) > 1:
            scores = self._scores()
            found.sort(key=lambda path: scores.get(step_of(path), math.inf))
        if not found and self.best_weights.is_file():
            found = [self.best_weights]
        if not found:
            raise UserError(
                f"{self.path} has no checkpoint of a validation; expected {self.checkpoints / 'best-*.ckpt'}"
            )
        return found[0]

    def _scores(self) -> dict[int, float]:
        """The score of each validation by its step, as far as metrics.jsonl can be read."""
        found: dict[int, float] = {}
        with suppress(Unreadable, OSError):
            for line in read_text(self.metrics_jsonl, _METRICS_BYTES).splitlines():
                match parse_json(line):
                    case {"step": int(step), "val/bpb": float(score)} | {"step": int(step), "val/loss": float(score)}:
                        found[step] = score
        return found

    def _named(self, kind: str) -> list[Path]:
        found = [path for path in self.checkpoints.glob(f"{kind}-*.ckpt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=step_of, reverse=True)

    def newest_checkpoint(self) -> Path:
        """The newest one whose checksum is right; logs a warning for each damaged one that is skipped.

        UserError: there is none yet, or all are damaged.
        """
        found, problems = self.resumable(), list[str]()
        if not found:
            raise self.without_checkpoint()
        for path in found:
            if (problem := damage(path)) is None:
                for line in problems:
                    log.warning(f"{line}; using {path.name} instead")
                return path
            problems.append(f"{path}: {problem}")
        raise UserError(f"{self.checkpoints}: all checkpoints are damaged ({'; '.join(problems)})")

    def without_checkpoint(self) -> UserError:
        """The error raised when a checkpoint is needed and there is none."""
        return UserError(f"{self.path} has no checkpoint yet: expected {self.checkpoints / 'step-*.ckpt'}")

    def rewind(self, step: int) -> None:
        """Prepares to resume from ``step``: deletes files that a killed process left half-written, and renames later
        checkpoints, so that they are not taken for the newest; ``drop_superseded`` deletes them."""
        for place in (self.path, self.checkpoints, self.recorded_overrides.parent):
            remove_partials(place)
        for path in (*self.step_checkpoints(), *self.best_checkpoints()):
            if step_of(path) > step:
                os.replace(path, path.with_name(path.name + _SUPERSEDED))

    def drop_superseded(self) -> None:
        """Deletes what ``rewind`` renamed; for when the run has a newer checkpoint."""
        for path in self.checkpoints.glob(f"*{_SUPERSEDED}"):
            path.unlink(missing_ok=True)

    def wandb_run(self) -> dict[str, str | None] | None:
        """id, project and entity of the run at W&B, the last two as far as they are known; None: it has none yet.
        UserError: the file holds none that W&B could have given."""
        if not self.wandb_id.exists():
            return None
        try:
            found = _OF_WANDB.fullmatch(read_text(self.wandb_id, 1000))
        except Unreadable as error:
            raise UserError(f"{self.wandb_id}: {error}") from None
        if found is None:
            raise UserError(
                f"{self.wandb_id}: expected the id, the project and the entity of a run at W&B, a line each; "
                "without the file a new run begins there"
            )
        return {name: value or None for name, value in found.groupdict().items()}

    def overrides(self) -> list[str]:
        """The overrides the run was started with, for display (config.yaml is what counts); [] if they cannot be
        read."""
        try:
            recorded = read_yaml(self.recorded_overrides)
        except Unreadable:
            return []
        lines = [str(line) for line in recorded] if isinstance(recorded, list) else []
        return [line for line in lines if not re.match(r"(ckpt|hydra)(\W|$)", key_of(line))]

    def record(self, overrides: Sequence[str]) -> None:
        """Records the overrides of this run and the directory its relative paths start from, in the files in which
        Hydra records those of a sweep's jobs."""
        self.recorded_overrides.parent.mkdir(exist_ok=True)
        directory = self.recorded_overrides.with_name("hydra.yaml")
        files: dict[Path, object] = {self.recorded_overrides: list(overrides)}
        if not directory.exists():
            files[directory] = {"hydra": {"runtime": {"cwd": str(Path.cwd())}}}
        for path, content in files.items():
            with replaced(path) as new:
                new.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint of a run folder."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[2])


def newest_run(root: Path) -> RunFolder | None:
    """The most recently started or resumed run in ``root``/outputs and ``root``/multirun, or None."""
    found = [config for name in _RUN_ROOTS for config in (root / name).glob("**/config.yaml")]
    found = [config for config in found if not _NOT_RUNS.intersection(config.relative_to(root).parts)]
    return RunFolder(max(found, key=lambda config: (config.stat().st_mtime_ns, config)).parent) if found else None


def find_run(name: str, root: Path | None = None) -> tuple[RunFolder, Path | None]:
    """The run folder that ``name`` means, and the checkpoint where it names one: ``last``, a run folder (None: its
    ``newest_checkpoint``; the weights where it has none), ``best`` (of the newest run, the checkpoint of the best
    validation), or a checkpoint in a run folder.

    ``root`` (default: the working directory) contains outputs/ and multirun/; relative paths start there.

    Raises:
        UserError: nothing there, not a run folder, or no checkpoint in it yet.
    """
    root = root or Path.cwd()
    path = (root / expanded(name)).absolute()
    if name in NEWEST or path.is_dir():
        folder = newest_run(root) if name in NEWEST else run_of(path)
        if folder is None:
            raise UserError(
                f"{name}: no run under {root / 'outputs'} or {root / 'multirun'}; start one with python train.py"
            )
        if name == "best":
            return folder, folder.best_checkpoint_kept()
        if folder.resumable():
            return folder, None
        if folder.weights.is_file():  # imported, or copied without its checkpoints
            return folder, folder.weights
        raise folder.without_checkpoint()
    if not path.exists():
        raise UserError(f"{name}: does not exist; expected `last`, `best`, a run folder, or a checkpoint in one")
    return run_of(path.parent.parent if path.parent.name == "checkpoints" else path.parent, name), path


def run_of(path: Path, name: str | None = None) -> RunFolder:
    """The run folder ``path``. UserError: it is not one, in which ``name`` stands."""
    folder = RunFolder(path)
    if not folder.is_run():
        raise UserError(
            f"{name or path}: not a run folder, or a file in one; expected config.yaml and checkpoints/ in {path}"
        )
    return folder

"""The run folder: the one place that knows the names of what lies in it. Needs no torch."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from hybridlm.files.plain import Unreadable, read_text, read_yaml

log = logging.getLogger(__name__)
_NAME = re.compile(r"(step|best)-(\d+)\.ckpt")
_OF_WANDB = re.compile(r"[^/\\#?%:*\[\x00-\x1f\x7f]{1,128}")  # what W&B takes as a name, and no pattern of files
_SUPERSEDED = ".superseded"  # behind the name of a checkpoint that a resumed run went back behind
JOB, SWEEP = (
    "job.json",
    "sweep.json",
)  # what `hybridlm sweep` says of one job, in its run's folder, and of all, in the folder above
_RUN_ROOTS = ("outputs", "multirun")
_NOT_RUNS = {".hydra", "wandb", "checkpoints"}  # folders inside a run that may hold a config.yaml of their own


@dataclass(frozen=True)
class RunFolder:
    """The folder ``path`` of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_jsonl(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def metrics_csv(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def chat_template(self) -> Path:
        """There where the run was trained on conversations."""
        return self.path / "chat_template.jinja"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def layers(self) -> Path:
        return self.path / "layers.txt"

    @property
    def plan(self) -> Path:
        return self.path / "plan.txt"

    @property
    def samples(self) -> Path:
        return self.path / "samples.txt"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def evaluation(self) -> Path:
        """What `hybridlm eval` found, all of it."""
        return self.path / "eval.json"

    @property
    def position_plot(self) -> Path:
        """Loss by the tokens before the target, of the last `hybridlm eval`."""
        return self.path / "loss_by_position.png"

    @property
    def weights(self) -> Path:
        """The weights of the end of the run, alone."""
        return self.path / "weights.safetensors"

    @property
    def best_weights(self) -> Path:
        return self.path / "best.safetensors"

    def samples_at(self, step: int) -> Path:
        """Text sampled during training, after ``step``."""
        return self.path / "samples" / f"step-{step:08d}.txt"

    @property
    def log(self) -> Path:
        """Messages with time and level."""
        return self.path / "train.log"

    @property
    def lock(self) -> Path:
        """Held by the process that trains in the folder."""
        return self.path / "train.lock"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def recorded_overrides(self) -> Path:
        return self.path / ".hydra" / "overrides.yaml"

    def is_run(self) -> bool:
        return self.config.is_file()

    @contextmanager
    def training(self) -> Iterator[Holding]:
        """While this process is the one that trains in the folder. UserError: another one does, or the folder cannot be
        written."""
        top = first_missing(self.path)
        try:
            with ExitStack() as stack:
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                    refuse_links(self.path)
                    held = stack.enter_context(holding(self.lock))
                except Held as error:
                    raise UserError(f"{self.path} is being trained by {error.who}") from None
                except OSError as error:
                    raise UserError(
                        f"{self.path}: cannot be written ({error.strerror or error}); hydra.run.dir=... names another"
                    ) from None
                yield held
        finally:
            remove_empty(self.path, top)

    def claim(self, config_text: str, *, anew: bool = False) -> None:
        """Make the folder this run's own by creating config.yaml in it. Raises UserError where another run did so
        before; ``anew``: unless that one has saved nothing to go on from."""
        self.path.mkdir(parents=True, exist_ok=True)
        if anew and not self.resumable():
            self.rewrite_config(config_text)
            return
        try:
            descriptor = os.open(self.config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise self.taken() from None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(config_text)

    def taken(self) -> UserError:
        """The error of a new run that is sent to this folder."""
        return UserError(
            f"{self.path} holds a run already: resume it with ckpt=auto, or name another folder (hydra.run.dir=...)"
        )

    def rewrite_config(self, config_text: str) -> None:
        """Replace config.yaml of a run that is resumed with new settings; a crash leaves the old file or the new
        one."""
        with replaced(self.config) as new:
            new.write_text(config_text, encoding="utf-8")

    def step_checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def best_checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"best-{step:08d}.ckpt"

    def resumable(self) -> list[Path]:
        """What a run can go on from, the highest step first: its step checkpoints; before there is one, those of its
        best validations."""
        return self.step_checkpoints() or self.best_checkpoints()

    def step_checkpoints(self) -> list[Path]:
        """The checkpoints of this run, newest (the highest step) first."""
        return self._named("step")

    def best_checkpoints(self) -> list[Path]:
        """Those of the best validations, the highest step first."""
        return self._named("best")

    def newest_checkpoint(self) -> Path:
        """The newest one whose bytes are as they were written; each damaged one that is passed over is reported in a
        line of the log.

        Raises ConfigError where there is none yet, or none that can be trusted.
        """
        found = self.resumable()
        if not found:
            raise UserError(f"{self.path} has no checkpoint yet: expected {self.checkpoints / 'step-*.ckpt'}")
        problems: dict[Path, str] = {}
        for path in found:
            problem = damage(path)
            if problem is None:
                for damaged, what in problems.items():
                    log.warning(f"{damaged}: {what}; using {path.name} instead")
                return path
            problems[path] = problem
        raise UserError(
            f"{self.checkpoints}: no checkpoint can be trusted"
            f" ({'; '.join(f'{path.name}: {what}' for path, what in problems.items())})"
        )

    def rewind(self, step: int) -> None:
        """Before a run goes on from ``step``: files that a killed process left half-written go, and later checkpoints,
        of a course that is given up, are renamed, so that nothing takes them for this run's newest; ``drop_superseded``
        deletes them."""
        remove_partials(self.checkpoints)
        remove_partials(self.path)
        for path in (*self.step_checkpoints(), *self.best_checkpoints()):
            if step_of(path) > step:
                os.replace(path, path.with_name(path.name + _SUPERSEDED))

    def drop_superseded(self) -> None:
        """Deletes what ``rewind`` renamed, once the run has a newer checkpoint."""
        for path in self.checkpoints.glob(f"*{_SUPERSEDED}"):
            path.unlink(missing_ok=True)

    def _named(self, kind: str) -> list[Path]:
        found = [path for path in self.checkpoints.glob(f"{kind}-*.ckpt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=step_of, reverse=True)

    def wandb_run(self) -> dict[str, str | None] | None:
        """id, project and entity of the run at W&B, the last two as far as they are known; None: it has none yet.
        UserError: the file holds none that W&B could have given."""
        if not self.wandb_id.exists():
            return None
        try:
            lines = read_text(self.wandb_id, 1000).rstrip("\n").split("\n")
        except Unreadable as error:
            raise UserError(f"{self.wandb_id}: {error}") from None
        if (
            len(lines) > 3
            or not _OF_WANDB.fullmatch(lines[0])
            or not all(_OF_WANDB.fullmatch(line) for line in lines[1:] if line)
        ):
            raise UserError(
                f"{self.wandb_id}: expected the id, the project and the entity of a run at W&B, a line each; "
                "without the file a new run begins there"
            )
        return {name: line or None for name, line in zip(("id", "project", "entity"), lines, strict=False)}

    def overrides(self) -> list[str]:
        """The overrides the run was started with, to be shown: what goes on is config.yaml. None where they cannot be
        read."""
        try:
            recorded = read_yaml(self.recorded_overrides)
        except Unreadable:
            return []
        lines = [str(line) for line in recorded] if isinstance(recorded, list) else []
        return [line for line in lines if not re.match(r"(ckpt|hydra)(\W|$)", key_of(line))]

    def record(self, overrides: Sequence[str]) -> None:
        """Keep the overrides of this run, and where its relative paths start from, where Hydra keeps those of a sweep's
        jobs."""
        self.recorded_overrides.parent.mkdir(exist_ok=True)
        started_in = {"hydra": {"runtime": {"cwd": str(Path.cwd())}}}
        for path, content in (
            (self.recorded_overrides, list(overrides)),
            (self.recorded_overrides.with_name("hydra.yaml"), started_in),
        ):
            if path == self.recorded_overrides or not path.exists():
                with replaced(path) as new:
                    new.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint of a run folder."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[2])


def newest_run(root: Path) -> RunFolder | None:
    """The run under ``root``/outputs and ``root``/multirun that was started or resumed last, or None."""
    found = [config for name in _RUN_ROOTS for config in (root / name).glob("**/config.yaml")]
    found = [config for config in found if not _NOT_RUNS.intersection(config.relative_to(root).parts)]
    return RunFolder(max(found, key=lambda config: (config.stat().st_mtime_ns, config)).parent) if found else None


def find_run(name: str, root: Path | None = None) -> tuple[RunFolder, Path]:
    """The run folder and the checkpoint that ``name`` means: ``last``, a run folder, or a checkpoint in a run folder.

    ``root`` (default: the working directory) is where outputs/ and multirun/ lie and what a relative path starts from.

    Raises:
        ConfigError: nothing there, not a run folder, or no checkpoint in it yet.
    """
    root = root or Path.cwd()
    if name == "last":
        folder = newest_run(root)
        if folder is None:
            raise UserError(
                f"last: no run under {root / 'outputs'} or {root / 'multirun'}; start one with python train.py"
            )
        return folder, folder.newest_checkpoint()
    path = (root / expanded(name)).absolute()
    if path.is_dir():
        folder = run_of(path)
        return folder, folder.newest_checkpoint()
    if not path.exists():
        raise UserError(f"{name}: does not exist; expected `last`, a run folder, or a checkpoint in one")
    folder = RunFolder(path.parent.parent if path.parent.name == "checkpoints" else path.parent)
    if not folder.is_run():
        raise UserError(
            f"{name}: lies in no run folder; expected RUN/checkpoints/step-00000200.ckpt with RUN/config.yaml"
        )
    return folder, path


def run_of(path: Path) -> RunFolder:
    """The run folder ``path``. Raises ConfigError where it is none."""
    folder = RunFolder(path)
    if not folder.is_run():
        raise UserError(f"{path}: not a run folder; expected config.yaml and checkpoints/ in it")
    return folder

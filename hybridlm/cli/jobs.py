"""A run that was decided on, as a job of Hydra's or as the part of one of its other processes.

Of a single run Hydra composes what is its own (``hydra.*``) and sets up logging; the configuration is the one that was
decided on. In a sweep it composes that of each job.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.cli.agreement import Agreement, Alone, Word
from hybridlm.cli.composition import hydra_errors, plain_tree
from hybridlm.cli.streams import prepare_streams
from hybridlm.cli.user_error import told
from hybridlm.config.constraints import unused_section_warnings
from hybridlm.config.groups import root
from hybridlm.config.load import load_config
from hybridlm.config.overrides import CommandLine, key_of, merged
from hybridlm.config.run import RunConfig
from hybridlm.errors import UserError
from hybridlm.files.held import Holding
from hybridlm.machine.signals import heeded
from hybridlm.runs.log_file import LogFile
from hybridlm.runs.resume import Resume, recorded, requeued
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.matching import matched
from hybridlm.train.call import Call, NothingLeft

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)
_Job = Callable[["DictConfig"], object]
_Others = Agreement | Alone
_LOG_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Begin:
    """A run that is about to begin, or to go on. overrides: of the command line, without ``ckpt``; folder: held, or
    None where only Hydra can name it; anew: also where a run has begun in the folder and saved nothing."""

    config: RunConfig
    overrides: tuple[str, ...]
    folder: RunFolder | None = None
    holding: Holding | None = None
    resume: Resume | None = None
    anew: bool = False


def train(begin: Begin, verb: tuple[str, ...], others: _Others) -> None:
    """A single run, in Hydra's job. Raises UserError and RunFailed."""
    from hydra.core.hydra_config import HydraConfig

    folder = begin.folder or RunFolder(Path(HydraConfig.get().runtime.output_dir))
    before = folder.overrides() if begin.resume else []
    given = merged(before, [line for line in begin.overrides if not key_of(line).startswith("hydra")])
    call = Call(verb, tuple(given), anew=begin.anew, named=begin.resume is not None and begin.resume.named)
    checkpoint = begin.resume.checkpoint if begin.resume else None
    try:
        with ExitStack() as held:
            _run(begin.config, folder, begin.holding or held.enter_context(folder.training()), checkpoint, call, others)
    except NothingLeft as end:
        others.decide(None)
        print(end)


def sweep_job(verb: tuple[str, ...]) -> _Job:
    """A job of a sweep of Hydra's, which returns what a sweeper is to make small."""

    def job(tree: DictConfig) -> object:
        from hydra.core.hydra_config import HydraConfig

        folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
        prepare_streams("goes on")  # also in a process that a launcher of Hydra has started
        call = Call(
            verb, tuple(str(line) for line in HydraConfig.get().overrides.task), anew=requeued(folder), sweep=True
        )
        try:
            with folder.training() as holding:
                checkpoint = folder.newest_checkpoint() if call.anew and folder.resumable() else None
                result = _run(load_config(plain_tree(tree)), folder, holding, checkpoint, call, Alone())
                return result.get("val/bpb", result.get("val/loss"))
        except Exception as error:
            if (lines := told(error)) is not None:
                with ExitStack() as stack:
                    if not folder.is_run():  # nobody else's
                        stack.enter_context(_logged(folder))
                    log.error(lines)
            raise

    return job


def _run(
    config: RunConfig, folder: RunFolder, holding: Holding, checkpoint: Path | None, call: Call, others: _Others
) -> dict[str, Any]:
    """The part of the first process."""
    match = matched(config)
    for warning in [] if call.sweep else unused_section_warnings(match.config, call.overrides):
        log.warning(warning)
    for note in (match.config.model.layer_note, match.config.sweep.matched):
        if note:
            log.info(note)
    config = match.config.model_copy(update={"ckpt": None})  # of this start only
    word = Word(str(folder.path.absolute()), None if checkpoint is None else str(checkpoint.absolute()), os.getcwd())
    with ExitStack() as stack, heeded(config.trainer.requeue, True):
        from hybridlm.train.planned import planned  # imports torch: only now that the configuration is known to be good

        start = planned(config, checkpoint)
        from hybridlm.train.run import (
            run,  # imports Lightning, which takes seconds: only now that the run is known to fit
        )

        def meet() -> None:
            holding.sign()
            stack.enter_context(_logged(folder))
            stack.enter_context(_environment(word.environment()))
            others.decide(word)
            others.meet()

        return run(
            config, folder, checkpoint, call.told(overrides=merged(call.overrides, match.overrides), meet=meet), start
        )


def join(word: Word, verb: tuple[str, ...], others: _Others) -> None:
    """The part of another process in the run that the first one has decided on."""
    os.chdir(word.cwd)
    folder = RunFolder(Path(word.folder))
    config = recorded(folder)
    with heeded(config.trainer.requeue, False):
        from hybridlm.train.run import run

        run(config, folder, None if word.checkpoint is None else Path(word.checkpoint), Call(verb, meet=others.meet))


@contextmanager
def _logged(folder: RunFolder) -> Iterator[None]:
    """While the messages of the log go to the run folder, too."""
    handler = LogFile(str(folder.log))
    handler.setFormatter(logging.Formatter(_LOG_LINE))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def refused() -> Iterator[Callable[[_Job], _Job]]:
    """Wraps a job such that the user's errors leave the block and not the job: raised there, Hydra would print a line
    of its own first."""
    errors: list[Exception] = []

    def wrapped(job: _Job) -> _Job:
        def guarded(config: DictConfig) -> object:
            prepare_streams("goes on")
            try:
                return job(config)
            except Exception as error:
                if told(error) is None:  # a fault of ours
                    raise
                errors.append(error)
                return None

        return guarded

    yield wrapped
    if errors:
        raise errors[0]


def run_hydra(line: CommandLine, job: _Job) -> None:
    """Hand over to Hydra, with its errors as exceptions and its own command line in place of ours."""
    import hydra

    crashed: list[Exception] = []

    def task(config: DictConfig) -> object:
        try:
            return job(config)
        except Exception as error:
            if told(error) is None:
                crashed.append(error)
            raise

    entry = hydra.main(version_base="1.3", config_path=str(root() / "conf"), config_name="config")(task)
    argv = sys.argv
    sys.argv = [argv[0], *line.flags, *line.overrides]
    try:
        with _environment({"HYDRA_FULL_ERROR": "1"}), hydra_errors(line):
            entry()
    except UserError as error:
        if error.__cause__ in crashed:  # an error of that sort inside training is a fault of ours, not of the input
            raise error.__cause__ from None
        raise
    finally:
        sys.argv = argv

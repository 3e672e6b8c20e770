"""A decided run, as a job of Hydra's, as one rank of several, or as a job of a sweep."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.cli.compose import Composition, SweepJob, composed, environment, plain_tree
from hybridlm.cli.overlay import new_config
from hybridlm.cli.rendezvous import Decision, Rendezvous
from hybridlm.cli.streams import prepare_streams
from hybridlm.cli.user_error import lines_of
from hybridlm.config.constraints import unused_section_warnings
from hybridlm.config.load import load_config
from hybridlm.config.overrides import CommandLine, key_of, merged
from hybridlm.config.run import RunConfig
from hybridlm.files.held import Holding
from hybridlm.machine.signals import heeded
from hybridlm.runs.resume import Call, NothingLeft, Resume, recorded, requeued
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.matching import matched

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)
_LOG_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Begin:
    """A run that is about to start or resume. overrides: of the command line, without ``ckpt``; anew: may replace a run
    that has saved nothing in the folder."""

    config: RunConfig
    overrides: tuple[str, ...]
    composition: Composition
    folder: RunFolder
    holding: Holding
    resume: Resume | None = None
    anew: bool = False


def train(begin: Begin, verb: tuple[str, ...], others: Rendezvous | None) -> None:
    """A single run, in Hydra's job. Raises UserError and RunFailed."""
    before = begin.folder.overrides() if begin.resume else []
    given = merged(before, [line for line in begin.overrides if not key_of(line).startswith("hydra")])
    call = Call(verb, tuple(given), anew=begin.anew, named=begin.resume is not None and begin.resume.named)
    try:
        prepare_streams("continues")
        _run(begin.config, begin.folder, begin.holding, begin.resume, call, others)
    except NothingLeft as end:
        if others is not None:
            others.decide(None)
        print(end)


def sweep_job(verb: tuple[str, ...], flags: tuple[str, ...]) -> SweepJob:
    """A job of a Hydra sweep; returns the value that a sweeper minimises. flags: Hydra's, with which the sweep
    was started."""

    def job(tree: DictConfig, place: Path, overrides: tuple[str, ...]) -> object:
        folder = RunFolder(place)
        prepare_streams("continues")  # also in a process that a launcher of Hydra has started
        call = Call(verb, overrides, anew=requeued(folder), sweep=True)
        try:
            with folder.training() as holding:
                resume = Resume(folder.newest_checkpoint(), named=True) if call.anew and folder.resumable() else None
                again = None if resume is None else folder
                config = _config_of(tree, CommandLine(flags, overrides), again)
                result = _run(config, folder, holding, resume, call, None)
                return result.get("val/bpb", result.get("val/loss"))
        except Exception as error:
            if (lines := lines_of(error)) is not None:
                with nullcontext() if folder.is_run() else _logged(folder):  # a run's log is somebody else's
                    log.error(lines)
            raise

    return job


def _config_of(job: DictConfig, line: CommandLine, resumed: RunFolder | None) -> RunConfig:
    """The configuration of one job of a sweep."""
    if job.get("init_from") is None:
        return load_config(plain_tree(job))
    return new_config(line, composed(line)) if resumed is None else recorded(resumed)


def _run(
    config: RunConfig, folder: RunFolder, holding: Holding, resume: Resume | None, call: Call, others: Rendezvous | None
) -> dict[str, Any]:
    """The part of the first process."""
    match = matched(config)
    for warning in [] if call.sweep else unused_section_warnings(match.config, call.overrides):
        log.warning(warning)
    for note in (match.config.model.layer_note, match.config.sweep.matched):
        if note:
            log.info(note)
    config = match.config.model_copy(update={"ckpt": None})  # of this start only
    checkpoint = None if resume is None else resume.checkpoint
    decision = Decision(
        str(folder.path.absolute()), None if checkpoint is None else str(checkpoint.absolute()), os.getcwd()
    )
    call = replace(call, overrides=tuple(merged(call.overrides, match.overrides)))
    with ExitStack() as stack, heeded(config.trainer.requeue, True):
        from hybridlm.train.resumed import planned  # imports torch: only once the configuration is known to be valid

        start = planned(config, checkpoint, verified=True)
        from hybridlm.train.run import run  # imports Lightning, which takes seconds: only once the run is known to fit

        def meet() -> None:
            holding.sign()
            stack.enter_context(_logged(folder))
            stack.enter_context(environment(decision.environment()))
            if others is not None:
                others.decide(decision)
                others.meet()

        return run(config, folder, checkpoint, replace(call, meet=meet), start)


def join(decision: Decision, verb: tuple[str, ...], others: Rendezvous | None = None) -> None:
    """The part of another rank in the run that the first one has decided on."""
    os.chdir(decision.cwd)
    folder = RunFolder(Path(decision.folder))
    config = recorded(folder)
    call = Call(verb) if others is None else Call(verb, meet=others.meet)
    with heeded(config.trainer.requeue, False):
        from hybridlm.train.run import run

        run(config, folder, None if decision.checkpoint is None else Path(decision.checkpoint), call)


@contextmanager
def _logged(folder: RunFolder) -> Iterator[None]:
    """While log messages go to the run folder, too."""
    logging.raiseExceptions = False  # a full disk, which the metrics and the checkpoints report
    handler = logging.FileHandler(folder.log, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(_LOG_LINE))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()

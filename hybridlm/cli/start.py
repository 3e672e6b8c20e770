"""The entry of training: reads the command line, decides what starts or resumes, and runs it.

A single run is composed once and decided before Hydra's job begins, so that a mistake leaves nothing behind. In a sweep
a mistake is an exception of its job: the other jobs run, and the sweep ends with exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from hybridlm.cli.compose import axes, composed, config_dir, run_hydra, run_job
from hybridlm.cli.jobs import Begin, join, sweep_job, train
from hybridlm.cli.overlay import new_config, overlaid
from hybridlm.cli.rendezvous import Rendezvous, inherited
from hybridlm.cli.user_error import reported
from hybridlm.config.constraints import overridden_sections
from hybridlm.config.groups import groups
from hybridlm.config.help_page import help_page
from hybridlm.config.load import to_yaml
from hybridlm.config.overrides import HYDRA_FLAGS, CommandLine, is_group, key_of, refuse_flags, repair, split, value_of
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError, UserError
from hybridlm.machine.launcher import ending_together, folder_overrides, launch, refuse_sweep
from hybridlm.machine.signals import heeded, listening
from hybridlm.runs.initial import NOT_IN_A_SWEEP
from hybridlm.runs.resume import checkpoint_to_resume, recorded, refuse_other_optimizer, resumed_folder
from hybridlm.runs.run_folder import NEWEST, RunFolder
from hybridlm.sweep.grid import effectless
from hybridlm.sweep.matching import matched

_PASSED_THROUGH = ("--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i")


def main(argv: list[str] | None = None, verb: tuple[str, ...] = ()) -> None:
    """Run training as ``argv`` (default: the process's arguments) says; ``verb`` is the command-line verb it came
    through.

    Exits with code 2 and a line per problem where the input is wrong; returns when the run is done. Other errors of
    training propagate.
    """
    with ending_together(), reported("continues"), listening():
        decision, words = inherited(), sys.argv[1:] if argv is None else argv
        if decision is not None:
            join(decision, verb)
            return
        refuse_flags(words, HYDRA_FLAGS, "--help, --cfg job, -m, --config-dir and Hydra's others (--hydra-help)")
        _main(split(words), verb)


def _main(line: CommandLine, verb: tuple[str, ...]) -> None:
    if line.has(*_PASSED_THROUGH):
        run_hydra(line)
        return
    known = groups(config_dir(line))
    line = CommandLine(line.flags, tuple(repair(line.overrides, known, several=line.multirun)))
    if line.has("--help", "-h"):
        print(help_page(known, composed(line).tree), end="")
    elif not line.multirun:
        _show(line) if line.has("--cfg", "-c") else _single(line, verb)
    elif line.has("--cfg", "-c"):
        raise UserError("--cfg shows one configuration; remove -m")
    elif value_of(line.overrides, "ckpt") not in (None, "null"):
        raise UserError("ckpt: a sweep cannot resume; resume one of its runs with ckpt=PATH and without -m")
    else:
        refuse_sweep(launch())
        _check_sweep(line)
        run_hydra(line, sweep_job(verb, line.flags))


def _single(line: CommandLine, verb: tuple[str, ...]) -> None:
    launched = launch()
    shared = folder_overrides(launched, line.overrides)  # of a new run
    place = value_of((*line.overrides, *shared), "hydra.run.dir") or "outputs"
    others = None if launched is None else Rendezvous(launched, Path("outputs" if "${" in place else place))
    with others or nullcontext(), ExitStack() as held:
        if others is not None and launched is not None and launched.rank > 0:
            with heeded(False, False):
                decision = others.decision()
            if decision is not None:
                join(decision, verb, others)
            return
        begin = _decided(line, shared, held)
        run_job(line, begin.composition, begin.folder.path, lambda: train(begin, verb, others))


def _decided(line: CommandLine, shared: Sequence[str], held: ExitStack) -> Begin:
    """What starts or resumes, once everything about the command line itself has been checked.

    shared: overrides that name the folder of a new run; held: is entered with the run's folder.
    """
    ckpt, named, line = _resumes(line)
    folder = resumed_folder(ckpt, named)
    new = composed(line if folder else CommandLine(line.flags, (*line.overrides, *shared)))
    if folder is None:
        config = new_config(line, new)
        if ckpt is None and config.ckpt is not None:  # set in a YAML file
            ckpt = config.ckpt
            folder = resumed_folder(ckpt, named)
    if folder is not None and ckpt is not None:
        holding = held.enter_context(folder.training())
        resume, old = checkpoint_to_resume(ckpt, folder), recorded(folder, rules=False)
        config = overlaid(old, line, new)
        refuse_other_optimizer(folder, old, config)
        return Begin(config, line.overrides, new, folder, holding, resume)
    if new.run_dir is None:
        raise ConfigError("hydra.run.dir: cannot be resolved; name the folder (hydra.run.dir=...)")
    found = RunFolder(new.run_dir.absolute())
    holding = held.enter_context(found.training())
    if found.is_run() and ckpt != "auto":
        raise found.taken()
    return Begin(config, line.overrides, new, found, holding, anew=ckpt == "auto")


def _resumes(line: CommandLine) -> tuple[str | None, str | None, CommandLine]:
    """What ``ckpt`` and ``hydra.run.dir`` say, and the command line without ``ckpt``. ConfigError: it says both what to
    resume and what to start from."""
    others = tuple(override for override in line.overrides if key_of(override) != "ckpt")
    ckpt, named = value_of(line.overrides, "ckpt"), value_of(line.overrides, "hydra.run.dir")
    weights = value_of(line.overrides, "init_from")
    if weights not in (None, "null") and ckpt not in (None, "null", "auto"):
        raise ConfigError(
            f"init_from = {weights} starts a new run, and ckpt = {ckpt} resumes one; give one of them (with ckpt=auto"
            " the run resumes if it was started before)"
        )
    return ckpt, named, CommandLine(line.flags, others)


def _check_sweep(line: CommandLine) -> None:
    """UserError: the folder holds a sweep already, or a file names code. Prints a warning for each overridden section
    that no point of a (basic) sweep uses."""
    found, known = axes(line), groups(config_dir(line))
    if any(value_of([one], "init_from") in NEWEST for axis in found for one in axis.values):
        raise UserError(NOT_IN_A_SWEEP)
    chosen = [axis for axis in found if is_group(f"{axis.key}=", known)]
    fixed = tuple(value for axis in chosen if not axis.varied for value in axis.values)
    for values in [(), *((value,) for axis in chosen if axis.varied for value in axis.values)]:
        with suppress(ConfigError):  # its job reports it, and ends alone
            composed(CommandLine(line.flags, (*fixed, *values)))
    named = value_of(line.overrides, "hydra.sweep.dir")
    if named is not None and any(Path(named).glob("*/config.yaml")):
        raise UserError(f"{named} already holds the runs of a sweep; choose another folder (hydra.sweep.dir=...)")
    if not overridden_sections(line.overrides) or value_of(line.overrides, "hydra/sweeper") is not None:
        return

    def config_at(point: Sequence[str]) -> RunConfig:
        each = CommandLine(line.flags, tuple(point))
        return new_config(each, composed(each))

    for warning in effectless(found, config_at):
        print(warning, file=sys.stderr)


def _show(line: CommandLine) -> None:
    """--cfg: the configuration of the run."""
    ckpt, named, others = _resumes(line)
    folder = resumed_folder(ckpt, named)
    if folder is None:
        config = new_config(line, composed(line))
    else:
        config = overlaid(recorded(folder, rules=False), others, composed(others))
    if folder is None and config.init_from is None:
        run_hydra(line)
    else:
        print(to_yaml(matched(config).config), end="")

"""The entry of training: reads the command line, decides what begins or goes on, and hands it to Hydra or, in other
ranks, runs it.

A single run is decided before Hydra starts, so that a mistake leaves nothing behind; Hydra itself writes nothing into
its folder. In a sweep a mistake is an exception of its job: the other jobs run, and the sweep ends with code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from hybridlm.cli.agreement import Agreement, Alone, inherited
from hybridlm.cli.composition import axes, composed, config_dir, is_group
from hybridlm.cli.jobs import Begin, join, refused, run_hydra, sweep_job, train
from hybridlm.cli.overlay import overlaid
from hybridlm.cli.user_error import reported
from hybridlm.config.constraints import overridden_sections
from hybridlm.config.groups import ROOT_VARIABLE, groups, root
from hybridlm.config.help_page import help_page
from hybridlm.config.load import load_config, to_yaml
from hybridlm.config.overrides import HYDRA_FLAGS, CommandLine, key_of, refuse_flags, repair, split, value_of
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError, UserError
from hybridlm.machine.launcher import folder_overrides, launch, refuse_sweep
from hybridlm.machine.lifetime import ending_together
from hybridlm.machine.signals import heeded, listening
from hybridlm.runs.resume import quoted, recorded, refuse_other_model, resumed, resumed_folder
from hybridlm.runs.run_folder import RunFolder
from hybridlm.sweep.grid import effectless
from hybridlm.sweep.matching import matched

_PASSED_THROUGH = ("--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i")


def main(argv: list[str] | None = None, verb: tuple[str, ...] = ()) -> None:
    """Run training as ``argv`` (default: the process's arguments) says; ``verb`` is the command-line verb it came
    through.

    Exits with code 2 and a line per problem where the input is wrong; returns when the run is done. What training
    raises passes.
    """
    with ending_together(), reported("goes on"), listening():
        word, words = inherited(), sys.argv[1:] if argv is None else argv
        if word is not None:
            join(word, verb, Alone())
            return
        refuse_flags(words, HYDRA_FLAGS, "--help, --cfg job, -m, --config-dir and Hydra's others (--hydra-help)")
        _main(split(words), verb)


def compose_config(overrides: Sequence[str], base: RunConfig | None = None) -> RunConfig:
    """The validated configuration of these overrides, or of ``base`` with them on top, without a run. Raises
    ConfigError."""
    line = CommandLine((), tuple(repair(overrides, groups())))
    return matched(load_config(composed(line).tree) if base is None else overlaid(base, line)).config


def _main(line: CommandLine, verb: tuple[str, ...]) -> None:
    os.environ[ROOT_VARIABLE] = root().as_posix()
    if line.has("--experimental-rerun"):
        raise UserError("--experimental-rerun: reads a pickle, which could run code; a run goes on with ckpt=RUN")
    if line.has(*_PASSED_THROUGH):
        run_hydra(line, lambda config: None)
        return
    line = CommandLine(line.flags, tuple(repair(line.overrides, groups(config_dir(line)), several=line.multirun)))
    if line.has("--help", "-h"):
        print(help_page(groups(config_dir(line)), composed(line).tree), end="")
    elif not line.multirun:
        _single(line, verb)
    elif line.has("--cfg", "-c"):
        raise UserError("--cfg shows one configuration; leave -m away")
    elif value_of(line.overrides, "ckpt") not in (None, "null"):
        raise UserError("ckpt: a sweep cannot resume; resume one of its runs with ckpt=PATH and without -m")
    else:
        refuse_sweep(launch(), line.overrides)
        _check_sweep(line)
        run_hydra(line, sweep_job(verb))


def _single(line: CommandLine, verb: tuple[str, ...]) -> None:
    launched = launch()
    if line.has("--cfg", "-c"):
        _show(line)
        return
    shared = folder_overrides(launched, line.overrides)  # of a run that begins
    place = value_of((*line.overrides, *shared), "hydra.run.dir") or "outputs"
    others = Alone() if launched is None else Agreement(launched, Path("outputs" if "${" in place else place))
    with others, ExitStack() as held:
        if isinstance(others, Agreement) and launched is not None and launched.rank > 0:
            with heeded(False, False):
                word = others.word()
            if word is not None:
                join(word, verb, others)
            return
        begin = _decided(line, shared, held)
        hydra = [] if begin.folder is None else [f"hydra.run.dir={quoted(begin.folder.path)}"]
        kept = [override for override in begin.overrides if not hydra or key_of(override) != "hydra.run.dir"]
        with refused() as leaving:
            job = leaving(lambda config: train(begin, verb, others))
            run_hydra(CommandLine(line.flags, (*kept, *hydra, "hydra.output_subdir=null")), job)


def _decided(line: CommandLine, shared: Sequence[str], held: ExitStack) -> Begin:
    """What begins or goes on, after everything has been looked at that can be wrong with the command line itself.

    shared: overrides that name the folder of a run that begins; held: is entered with the run's folder, where that is
    known.
    """
    ckpt, named = value_of(line.overrides, "ckpt"), value_of(line.overrides, "hydra.run.dir")
    overrides = tuple(override for override in line.overrides if key_of(override) != "ckpt")
    folder, new = resumed_folder(ckpt, named), None
    if folder is None:
        new = composed(CommandLine(line.flags, (*overrides, *shared)))
        config = load_config(new.tree)
        if ckpt is None and config.ckpt is not None:  # it stands in a YAML
            ckpt = config.ckpt
            folder = resumed_folder(ckpt, named)
    if folder is not None and ckpt is not None:
        holding = held.enter_context(folder.training())
        resume, old = resumed(ckpt, folder), recorded(folder)
        config = overlaid(old, CommandLine(line.flags, overrides))
        refuse_other_model(folder, old, matched(config).config)
        return Begin(config, overrides, folder, holding, resume)
    assert new is not None
    if new.run_dir is None:
        return Begin(config, overrides)
    found = RunFolder(new.run_dir.absolute())
    holding = held.enter_context(found.training())
    if found.is_run() and ckpt != "auto":
        raise found.taken()
    return Begin(config, overrides, found, holding, anew=ckpt == "auto")


def _check_sweep(line: CommandLine) -> None:
    """UserError: a folder that holds a sweep, or a file with code. Warns, in a line, of each overridden section that no
    point of a (basic) sweep uses."""
    found, known = axes(line), groups(config_dir(line))
    chosen = [axis for axis in found if is_group(f"{axis.key}=", known)]
    fixed = tuple(value for axis in chosen if not axis.varied for value in axis.values)
    for values in [(), *((value,) for axis in chosen if axis.varied for value in axis.values)]:
        with suppress(ConfigError):  # which is its job's, and ends that one alone
            composed(CommandLine(line.flags, (*fixed, *values)))
    named = value_of(line.overrides, "hydra.sweep.dir")
    if named is not None and any(Path(named).glob("*/config.yaml")):
        raise UserError(f"{named} holds the runs of a sweep already; name another folder (hydra.sweep.dir=...)")
    if not overridden_sections(line.overrides) or any(
        key_of(override) == "hydra/sweeper" for override in line.overrides
    ):
        return
    for warning in effectless(found, lambda point: load_config(composed(CommandLine(line.flags, tuple(point))).tree)):
        print(warning, file=sys.stderr)


def _show(line: CommandLine) -> None:
    """--cfg: what the run would be given."""
    ckpt, named = value_of(line.overrides, "ckpt"), value_of(line.overrides, "hydra.run.dir")
    overrides = tuple(override for override in line.overrides if key_of(override) != "ckpt")
    folder = resumed_folder(ckpt, named)
    if folder is None:
        load_config(composed(line).tree)
        run_hydra(line, lambda config: None)
    else:
        print(to_yaml(matched(overlaid(recorded(folder), CommandLine(line.flags, overrides))).config), end="")

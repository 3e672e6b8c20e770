"""The one Hydra entry: repairs the command line, composes, validates, and sets the exit code.

A single run is composed and validated before Hydra makes its folder, so a typing error leaves nothing behind. In a sweep a
configuration error is an exception of its job: the other jobs run, and the sweep ends with code 2.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hybridlm.command_line import HELP, HYDRA_FLAGS, CommandLine, key_of, merged, refuse_flags, repair, several_values, split, value_of
from hybridlm.config.constraints import overridden_sections, unused_section_warnings
from hybridlm.config.load import load_config
from hybridlm.config.resolve import layer_note
from hybridlm.config.run import RunConfig
from hybridlm.config_files import OF_PLUGINS, ROOT_VARIABLE, groups, no_such_option, root
from hybridlm.errors import ConfigError, UserError
from hybridlm.launcher import end_with_parent, folder_overrides, is_first_rank, launch, refuse_sweep
from hybridlm.notices import heeded, listen
from hybridlm.resume import after_requeue, plan_resume, quoted, refuse_other_model
from hybridlm.run_folder import RunFolder
from hybridlm.streams import prepare_streams
from hybridlm.sweep.grid import Axis, effectless
from hybridlm.sweep.matching import matched
from hybridlm.user_error import reported, told

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)
_PASSED_THROUGH = ("--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i", "--experimental-rerun")


def main(argv: list[str] | None = None, verb: tuple[str, ...] = ()) -> None:
    """Run training as ``argv`` (default: the process's arguments) says; ``verb`` is the command-line verb it came through.

    Exits with code 2 and a line per problem where the input is wrong; returns when the run is done. What training raises passes.
    """
    with reported("goes on"):
        listen()
        end_with_parent()
        words = sys.argv[1:] if argv is None else argv
        refuse_flags(words, HYDRA_FLAGS, "--help, --cfg job, -m, --config-dir and Hydra's others (--hydra-help)")
        _main(split(words), verb)


def compose_config(overrides: Sequence[str]) -> RunConfig:
    """The validated configuration of these overrides, without a run. Raises ConfigError."""
    return matched(_load(CommandLine((), tuple(repair(overrides, groups()))))[0]).config


def _main(line: CommandLine, verb: tuple[str, ...]) -> None:
    os.environ[ROOT_VARIABLE] = root().as_posix()
    if line.has(*_PASSED_THROUGH):
        _run_hydra(line, verb)
        return
    line = CommandLine(line.flags, tuple(repair(line.overrides, groups(_config_dir(line)))))
    if line.has("--help", "-h"):
        print(_help(line))
        return
    launched = launch()
    if not line.multirun:
        line = _checked(line)
        line = CommandLine(line.flags, (*line.overrides, *folder_overrides(launched, line.overrides)))
    elif line.has("--cfg", "-c"):
        raise UserError("--cfg shows one configuration; leave -m away")
    elif value_of(line.overrides, "ckpt") not in (None, "null"):
        raise UserError("ckpt: a sweep cannot resume; resume one of its runs with ckpt=PATH and without -m")
    else:
        refuse_sweep(launched, line.overrides)
        _warn_of_sweep(line)
    _run_hydra(line, verb)


def _checked(line: CommandLine) -> CommandLine:
    """The command line of a single run with ``ckpt`` settled, after everything that can be wrong with it has been looked at."""
    resume = plan_resume(line.overrides)
    config, run_dir = _load(line if resume is None else CommandLine(line.flags, resume.overrides))
    if resume is None and config.ckpt is not None:  # ckpt=auto without a run, or a ckpt that stands in a YAML
        asked = [*line.overrides, f"++ckpt={quoted(config.ckpt)}"]
        resume = plan_resume(asked)
        line = CommandLine(line.flags, (*line.overrides, "++ckpt=null"))
        config, run_dir = _load(line if resume is None else CommandLine(line.flags, resume.overrides))
    if resume is not None:
        refuse_other_model(resume.folder, matched(config).config)
        return CommandLine(line.flags, resume.overrides)
    if not line.has("--cfg", "-c") and run_dir is not None and is_first_rank() and RunFolder(run_dir).is_run():
        raise RunFolder(run_dir).taken()
    return line


def _config_dir(line: CommandLine) -> str | None:
    folder = line.value("--config-dir", "-cd")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    return folder


def _load(line: CommandLine) -> tuple[RunConfig, Path | None]:
    """The validated configuration, and the run folder as far as it can be told before the run. Raises ConfigError."""
    config, tree = _compose(line)
    try:
        run_dir = Path(str(config.hydra.run.dir))
    except Exception:  # a name that only Hydra can make when the job starts
        run_dir = None
    return load_config(tree), run_dir


def _compose(line: CommandLine) -> tuple[DictConfig, dict[str, object]]:
    """Hydra's configuration and, as plain values, the part of it that is ours."""
    os.environ[ROOT_VARIABLE] = root().as_posix()
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    overrides = list(line.overrides)
    if extra := _config_dir(line):
        places = (Path(extra).resolve(), root())
        overrides.append(f"hydra.searchpath=[{','.join(quoted(f'file://{place.as_posix()}') for place in places)}]")
    with _hydra_errors(line), initialize_config_dir(config_dir=str(root() / "conf"), version_base="1.3"):
        name = line.value("--config-name", "-cn") or "config"
        config = compose(config_name=name, overrides=overrides, return_hydra_config=True)
        before = HydraConfig.instance().cfg
        try:
            with open_dict(config):
                config.hydra.runtime.output_dir = str(Path.cwd() / "outputs")  # so that ${hydra:runtime.output_dir} resolves
            HydraConfig.instance().set_config(config)
            return config, _tree(config)
        finally:
            HydraConfig.instance().cfg = before


def _tree(config: DictConfig) -> dict[str, object]:
    """Our part of Hydra's configuration as plain values, interpolations resolved; ``???`` stays for validation to report."""
    from omegaconf import OmegaConf

    tree: dict[str, object] = {}
    for key in config:
        if key != "hydra":
            value = "???" if OmegaConf.is_missing(config, key) else config[key]
            tree[str(key)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if "experiments" in tree:
        raise ConfigError("experiments: the file of an experiment needs `# @package _global_` as its first line")
    return tree


@contextmanager
def _hydra_errors(line: CommandLine) -> Iterator[None]:
    """Errors of composition, which are the user's, as ConfigError of one line."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        known = groups(_config_dir(line))
        top = group.partition("/")[0]
        if top in known:  # an option may lie in a folder of the group
            text = no_such_option(top, (error.missing_cfg_file or "").removeprefix(f"{top}/"), known)
        elif group and (error.options is not None or f"{group}/{option}" in OF_PLUGINS):
            text = no_such_option(group, option, {group: list(error.options or ())})
        else:
            text = _one_line(error)
        place = re.match(r"In '([^']+)'", str(error))
        raise ConfigError(text if place is None or place[1] in ("config", "hydra/config") else f"{place[1]}: {text}") from error
    except OverrideParseException as error:
        reason = re.sub(r" expecting .*", "", _one_line(error).removeprefix(f"Error parsing override '{error.override}'").strip())
        shown = error.override.lstrip("+")
        raise ConfigError(f"{shown!r} cannot be read: {reason}; quote a value with special characters: key='\"value\"'") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        if (several := several_values(_one_line(error))) is not None:
            raise ConfigError(several) from error
        cause = error.__cause__
        raise ConfigError("; ".join(_one_line(part) for part in (error, cause) if part is not None and str(part))) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return re.sub(r" *(See https://hydra\S* for details|full_key: \S*|object_type=\S*|reference_type=\S*)", "", text).strip()


def _run_hydra(line: CommandLine, verb: tuple[str, ...]) -> None:
    """Hand over to Hydra, with its errors as exceptions and its own command line in place of ours."""
    import hydra

    refused: list[Exception] = []
    crashed: list[Exception] = []
    entry = hydra.main(version_base="1.3", config_path=str(root() / "conf"), config_name="config")(_task(verb, refused, crashed))
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *line.flags, *line.overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with _hydra_errors(line):
            entry()
    except UserError as error:
        if error.__cause__ in crashed:  # an error of that sort inside training is a fault of ours, not of the input
            raise error.__cause__ from None
        raise
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    if refused:
        raise refused[0]


def _task(verb: tuple[str, ...], refused: list[Exception], crashed: list[Exception]) -> Callable[[DictConfig], object]:
    """One job of Hydra. A single run leaves the user's errors in ``refused``: raised, Hydra would print a line of its own first."""

    def train(config: DictConfig) -> object:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        prepare_streams("goes on")  # also in a process that a launcher of Hydra has started
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            return _job(config, verb, sweep)
        except Exception as error:
            lines = told(error)
            if lines is None:
                crashed.append(error)
                raise
            if sweep:
                log.error(lines)
                raise
            refused.append(error)
            return None

    return train


def _job(tree: DictConfig, verb: tuple[str, ...], sweep: bool) -> object:
    from hydra.core.hydra_config import HydraConfig

    match = matched(load_config(_tree(tree)))
    overrides = [str(line) for line in HydraConfig.get().overrides.task]
    folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    resume = Path(match.config.ckpt) if match.config.ckpt else after_requeue(folder)
    config = match.config.model_copy(update={"ckpt": None})  # of this start only
    if is_first_rank():
        if resume is not None or match.overrides:
            folder.record_overrides(merged([line for line in overrides if key_of(line) != "ckpt"], match.overrides))
        for warning in [] if sweep else unused_section_warnings(config, overrides):
            log.warning(warning)
        for note in (layer_note(config.model), config.sweep.matched):
            if note:
                log.info(note)
    with heeded(config.trainer.requeue, is_first_rank()):
        from hybridlm.train.planned import planned  # imports torch: only now that the configuration is known to be good

        start = planned(config, resume)
        from hybridlm.train.run import run  # imports Lightning, which takes seconds: only now that the run is known to fit

        return (result := run(config, folder, resume, verb, start)).get("val/bpb", result.get("val/loss"))  # a number, for sweepers


def sweep_axes(overrides: Sequence[str]) -> list[Axis]:
    """What these overrides vary, in Hydra's own grammar of sweeps; the last of a key counts. Raises ConfigError."""
    return list({axis.key: axis for axis in _axes(CommandLine((), tuple(repair(overrides, groups()))))}.values())


def _axes(line: CommandLine) -> list[Axis]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    axes = []
    with _hydra_errors(line):
        for override in OverridesParser.create().parse_overrides(list(line.overrides)):
            key, value = override.get_key_element(), override.value()
            values: Iterable[str] = ()
            if isinstance(value, Glob):
                values = value.filter(groups(_config_dir(line)).get(key, []))
            elif override.is_discrete_sweep():
                values = override.sweep_string_iterator()
            varied = override.is_sweep_override()
            lines = tuple(f"{key}={one}" for one in values) if varied else (str(override.input_line),)
            axes.append(Axis(key_of(key), lines, varied))
    return axes


def _warn_of_sweep(line: CommandLine) -> None:
    """One warning line for each overridden section that no point of a (basic) sweep uses."""
    if not overridden_sections(line.overrides) or any(key_of(override) == "hydra/sweeper" for override in line.overrides):
        return
    for warning in effectless(_axes(line), lambda point: _load(CommandLine(line.flags, tuple(point)))[0]):
        print(warning, file=sys.stderr)


def _help(line: CommandLine) -> str:
    rows = [f"  {group}={'|'.join(options)}" for group, options in groups(_config_dir(line)).items()]
    tree = yaml.safe_dump(_compose(line)[1], sort_keys=False, allow_unicode=True)
    return f"{HELP}{chr(10).join(rows)}\n\nFields and their values with these arguments:\n\n{tree}"

"""The one Hydra entry: repairs the command line, composes, validates, and sets the exit code.

A single run is composed and validated before Hydra makes its folder, so a typing error leaves nothing behind. In a sweep a
configuration error is an exception of its job: the other jobs run, and the sweep ends with code 2.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hybridlm.command_line import CommandLine, key_of, repair, split, value_of
from hybridlm.config.constraints import overridden_sections, unused_section_warnings
from hybridlm.config.load import load_config
from hybridlm.config.resolve import layer_note
from hybridlm.config.run import RunConfig
from hybridlm.config.section import ConfigError, RunFailed
from hybridlm.config_files import ROOT_VARIABLE, groups, no_such_option, root
from hybridlm.launcher import folder_overrides, is_first_rank, launch, refuse_sweep
from hybridlm.resume import after_requeue, plan_resume, quoted, refuse_other_model
from hybridlm.run_folder import RunFolder
from hybridlm.user_error import reported, told

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)
_PASSED_THROUGH = ("--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i", "--experimental-rerun")
_SHAPES_MODEL = ("model", "size", "experiments")  # groups that may change which layers there are
_SWEEP_POINTS = 64  # more are not composed ahead only to warn of sections without effect
_HELP = """hybridlm trains small hybrid language models.

  python train.py [group=option ...] [field=value ...]      the same as: hybridlm train ...
  python train.py -m optim.lr=1e-3,3e-3                     a sweep
  python train.py ckpt=last trainer.max_steps=2000          resume the newest run

--cfg job prints the composed configuration; --hydra-help lists Hydra's own flags; docs/pattern.md explains model.pattern.

Groups and their options:
"""


def main(argv: list[str] | None = None, verb: tuple[str, ...] = ()) -> None:
    """Run training as ``argv`` (default: the process's arguments) says; ``verb`` is the command-line verb it came through.

    Exits with code 2 and a line per problem where the input is wrong; returns when the run is done. What training raises passes.
    """
    with reported():
        _main(split(sys.argv[1:] if argv is None else argv), verb)


def compose_config(overrides: Sequence[str]) -> RunConfig:
    """The validated configuration of these overrides, without a run. Raises ConfigError."""
    return _load(CommandLine((), tuple(repair(overrides, groups()))))[0]


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
        raise ConfigError("--cfg shows one configuration; leave -m away")
    elif value_of(line.overrides, "ckpt") not in (None, "null"):
        raise ConfigError("ckpt: a sweep cannot resume; resume one of its runs with ckpt=PATH and without -m")
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
        refuse_other_model(resume.folder, config)
        return CommandLine(line.flags, resume.overrides)
    if not line.has("--cfg", "-c") and run_dir is not None and is_first_rank() and RunFolder(run_dir).is_run():
        raise RunFolder(run_dir).taken()
    return line


def _config_dir(line: CommandLine) -> str | None:
    folder = line.value("--config-dir", "-cd")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder}: no such folder")
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
        elif group and error.options is not None:
            text = no_such_option(group, option, {group: list(error.options)})
        else:
            text = _one_line(error)
        place = re.match(r"In '([^']+)'", str(error))
        raise ConfigError(text if place is None or place[1] in ("config", "hydra/config") else f"{place[1]}: {text}") from error
    except OverrideParseException as error:
        reason = re.sub(r" expecting .*", "", _one_line(error).removeprefix(f"Error parsing override '{error.override}'").strip())
        shown = error.override.lstrip("+")
        raise ConfigError(f"{shown!r} cannot be read: {reason}; quote a value with special characters: key='\"value\"'") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        cause = error.__cause__
        raise ConfigError("; ".join(_one_line(part) for part in (error, cause) if part is not None and str(part))) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return re.sub(r" *(See https://hydra\S* for details|full_key: \S*|object_type=\S*|reference_type=\S*)", "", text).strip()


def _run_hydra(line: CommandLine, verb: tuple[str, ...]) -> None:
    """Hand over to Hydra, with its errors as exceptions and its own command line in place of ours."""
    import hydra

    refused: list[ConfigError | RunFailed] = []
    crashed: list[Exception] = []
    entry = hydra.main(version_base="1.3", config_path=str(root() / "conf"), config_name="config")(_task(verb, refused, crashed))
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *line.flags, *line.overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with _hydra_errors(line):
            entry()
    except ConfigError as error:
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


def _task(verb: tuple[str, ...], refused: list[ConfigError | RunFailed], crashed: list[Exception]) -> Callable[[DictConfig], object]:
    """One job of Hydra. A single run leaves the user's errors in ``refused``: raised, Hydra would print a line of its own first."""

    def train(config: DictConfig) -> object:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            return _job(config, verb, sweep)
        except (ConfigError, RunFailed) as error:
            if sweep:
                log.error(told(error))
                raise
            refused.append(error)
            return None
        except Exception as error:
            crashed.append(error)
            raise

    return train


def _job(tree: DictConfig, verb: tuple[str, ...], sweep: bool) -> object:
    from hydra.core.hydra_config import HydraConfig

    config = load_config(_tree(tree))
    overrides = [str(line) for line in HydraConfig.get().overrides.task]
    folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    resume = Path(config.ckpt) if config.ckpt else after_requeue(folder)
    config = config.model_copy(update={"ckpt": None})  # of this start only
    if is_first_rank():
        if resume is not None:
            folder.record_overrides([line for line in overrides if key_of(line) != "ckpt"])
        for warning in [] if sweep else unused_section_warnings(config, overrides):
            log.warning(warning)
        if note := layer_note(config.model):
            log.info(note)
    from hybridlm.train.run import run  # imports torch: only now that the configuration is known to be good

    return (result := run(config, folder, resume, verb)).get("val/bpb", result.get("val/loss"))  # a number, as sweepers that search expect


def _warn_of_sweep(line: CommandLine) -> None:
    """One warning line for each overridden section that no point of a (basic) sweep uses."""
    if not overridden_sections(line.overrides) or any(key_of(override) == "hydra/sweeper" for override in line.overrides):
        return
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _hydra_errors(line):
        parsed = OverridesParser.create().parse_overrides(list(line.overrides))
    choices: list[list[str]] = []
    for override in parsed:
        text = str(override.input_line)
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                return
            options = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            text_options = options if key_of(text).split(".")[0] in _SHAPES_MODEL else options[:1]
        else:
            text_options = [text]
        choices.append(text_options)
    points = list(itertools.islice(itertools.product(*choices), _SWEEP_POINTS + 1))
    if len(points) > _SWEEP_POINTS:
        return
    try:
        warnings = [unused_section_warnings(_load(CommandLine(line.flags, point))[0], point) for point in points]
    except ConfigError:
        return  # the job of that point reports it
    for warning in dict.fromkeys(warnings[0]):
        if all(warning in others for others in warnings):
            print(warning, file=sys.stderr)


def _help(line: CommandLine) -> str:
    rows = [f"  {group}={'|'.join(options)}" for group, options in groups(_config_dir(line)).items()]
    tree = yaml.safe_dump(_compose(line)[1], sort_keys=False, allow_unicode=True)
    return f"{_HELP}{chr(10).join(rows)}\n\nFields and their values with these arguments:\n\n{tree}"

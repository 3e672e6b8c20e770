"""The one door to Hydra: what a command line composes, with every mistake in one clear line, and the jobs that run in
Hydra's own environment (logging, callbacks, sweeps)."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from hybridlm.cli.group_files import refuse_code
from hybridlm.config.groups import OF_PLUGINS, ROOT_VARIABLE, groups, no_such_option, root
from hybridlm.config.overrides import CommandLine, key_of, quoted, refuse_odd, repair, several_values
from hybridlm.config.run import RunConfig
from hybridlm.errors import ConfigError, UserError
from hybridlm.sweep.grid import Axis
from hybridlm.sweep.matching import matched

if TYPE_CHECKING:
    from hydra._internal.config_repository import IConfigRepository
    from hydra.core.default_element import ResultDefault
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import MissingConfigException
    from omegaconf import DictConfig

# What Hydra and OmegaConf raise at odd values besides errors of their own: while composing, these are the user's.
_ODD = (AssertionError, AttributeError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError)


# One job of a sweep: its configuration, its folder, and the overrides of its point.
SweepJob = Callable[["DictConfig", Path, tuple[str, ...]], object]


@dataclass(frozen=True)
class Composition:
    """tree: our sections as plain values; choices: the option of each group; run_dir: of a single run, None: it cannot
    be resolved; config: all of it, Hydra's section included."""

    tree: dict[str, object]
    choices: dict[str, str | None]
    run_dir: Path | None
    config: DictConfig


def compose_config(overrides: Sequence[str], base: RunConfig | None = None) -> RunConfig:
    """The validated configuration of these overrides, or of ``base`` with them on top, without a run. Raises
    ConfigError."""
    from hybridlm.cli.overlay import new_config, overlaid

    line = CommandLine((), tuple(repair(overrides, groups())))
    found = composed(line)
    config = new_config(line, found) if base is None else overlaid(base, line, found)
    return matched(config).config


def composed(line: CommandLine) -> Composition:
    """What a (repaired) command line composes. Runs nothing that it names. Raises ConfigError."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    refuse_odd(line.overrides, groups(config_dir(line)))
    overrides = list(line.overrides)
    if extra := config_dir(line):
        places = (Path(extra).resolve(), root())
        overrides.append(f"hydra.searchpath=[{','.join(quoted(f'file://{place.as_posix()}') for place in places)}]")
    conf, name = str(root() / "conf"), line.value("--config-name", "-cn") or "config"
    with (
        environment({ROOT_VARIABLE: root().as_posix()}),
        hydra_errors(line, _ODD),
        _outside_jobs(),
        initialize_config_dir(config_dir=conf, version_base="1.3"),
    ):
        _check_files(GlobalHydra.instance(), [key_of(override) for override in line.overrides])
        config = compose(config_name=name, overrides=overrides, return_hydra_config=True)
        before = HydraConfig.instance().cfg
        try:
            with open_dict(config):  # so that ${hydra:runtime.output_dir} resolves
                config.hydra.runtime.output_dir = str(Path.cwd() / "outputs")
            HydraConfig.instance().set_config(config)
            choices = {str(group): option and str(option) for group, option in config.hydra.runtime.choices.items()}
            run_dir = None
            with suppress(Exception):
                run_dir = Path(str(config.hydra.run.dir))
            return Composition(plain_tree(config), choices, run_dir, config)
        finally:
            HydraConfig.instance().cfg = before


@contextmanager
def _outside_jobs() -> Iterator[None]:
    """Puts aside the Hydra of the sweep that this is a job of, as there can be one at a time."""
    from hydra.core.global_hydra import GlobalHydra

    of_process = GlobalHydra.instance()
    outer, of_process.hydra = of_process.hydra, None
    try:
        yield
    finally:
        of_process.hydra = outer


def _check_files(hydra: GlobalHydra, given: Collection[str]) -> None:
    """Has every file that Hydra chooses pass ``refuse_code`` before it is merged. Hydra has no hook there; its
    compute_defaults_list would read and choose all files again, which takes as long as composing them."""
    loader: Any = hydra.config_loader()
    merge = loader._compose_config_from_defaults_list

    def checked(defaults: Sequence[ResultDefault], repo: IConfigRepository) -> DictConfig:
        sources = [Path(source.path) for source in repo.get_sources() if source.scheme() == "file"]
        refuse_code([(str(one.config_path), one.package or "") for one in defaults], sources, given)
        merged: DictConfig = merge(defaults=defaults, repo=repo)
        return merged

    loader._compose_config_from_defaults_list = checked


def config_dir(line: CommandLine) -> str | None:
    """The folder of Hydra's --config-dir. UserError: it does not exist."""
    folder = line.value("--config-dir", "-cd")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    return folder


def plain_tree(config: DictConfig) -> dict[str, object]:
    """Our part of Hydra's configuration as plain values, interpolations resolved; ``???`` is left for validation to
    report."""
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
def hydra_errors(line: CommandLine, odd: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Errors of composition, which are the user's, as ConfigError of one line; those of the types ``odd`` too."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except UserError:
        raise
    except MissingConfigException as error:
        raise ConfigError(_missing(error, line)) from error
    except OverrideParseException as error:
        said = re.sub(r" expecting .*", "", _short(error).removeprefix(f"Error parsing override '{error.override}'"))
        raise ConfigError(
            f"{_short(repr(error.override.lstrip('+')))} cannot be parsed: {said.strip()}; quote a value with special"
            " characters: key='\"value\"'"
        ) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        parts = [_short(part) for part in (error, error.__cause__) if part is not None and str(part)]
        raise ConfigError(_short(several_values(_one_line(error)) or "; ".join(parts))) from error
    except odd as error:
        raise ConfigError(f"these arguments cannot be composed ({_short(error) or type(error).__name__})") from error


def _missing(error: MissingConfigException, line: CommandLine) -> str:
    """The line about an option that does not exist."""
    file = error.missing_cfg_file or ""
    group, _, option = file.rpartition("/")
    known = groups(config_dir(line))
    own = group if group in known else group.partition("/")[0]
    if own in known:  # an option may be in a subfolder of the group
        text = no_such_option(own, file.removeprefix(f"{own}/"), known)
    elif group and (error.options is not None or f"{group}/{option}" in OF_PLUGINS):
        text = no_such_option(group, option, {group: list(error.options or ())})
    else:
        text = _one_line(error)
    place = re.match(r"In '([^']+)'", str(error))
    return text if place is None or place[1] in ("config", "hydra/config") else f"{place[1]}: {text}"


def _one_line(error: object) -> str:
    noise = r" *(See https://hydra\S* for details|full_key: \S*|object_type=\S*|reference_type=\S*)"
    return re.sub(noise, "", " ".join(str(error).split())).strip()


def _short(error: object) -> str:
    text = _one_line(error)
    return text if len(text) <= 400 else text[:397] + "..."


def sweep_axes(overrides: Sequence[str]) -> list[Axis]:
    """What these overrides vary, in Hydra's own grammar of sweeps; the last of a key counts. Raises ConfigError."""
    found = axes(CommandLine((), tuple(repair(overrides, groups(), several=True))))
    return list({axis.key: axis for axis in found}.values())


def axes(line: CommandLine) -> list[Axis]:
    """One for each override of a (repaired) command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    found = []
    with hydra_errors(line, _ODD):
        for override in OverridesParser.create().parse_overrides(list(line.overrides)):
            key, value = override.get_key_element(), override.value()
            values: Iterable[str] = ()
            if isinstance(value, Glob):
                values = value.filter(groups(config_dir(line)).get(key, []))
            elif override.is_discrete_sweep():
                values = override.sweep_string_iterator()
            varied = override.is_sweep_override()
            lines = tuple(f"{key}={one}" for one in values) if varied else (str(override.input_line),)
            found.append(Axis(key_of(key), lines, varied))
    return found


def run_job(line: CommandLine, composition: Composition, folder: Path, job: Callable[[], None]) -> None:
    """``job`` as Hydra's single job in ``folder``: with its logging, callbacks and environment, from what was composed
    already. What ``job`` raises passes."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import run_job as run_in_hydra
    from hydra.types import HydraContext, RunMode
    from omegaconf import read_write

    config = composition.config
    with read_write(config.hydra), read_write(config.hydra.run):
        config.hydra.run.dir, config.hydra.output_subdir, config.hydra.mode = str(folder), None, RunMode.RUN
    with environment({ROOT_VARIABLE: root().as_posix()}), hydra_errors(line):
        callbacks = Callbacks(config)
        callbacks.on_run_start(config=config, config_name=config.hydra.job.config_name)
        context = HydraContext(config_loader=None, callbacks=callbacks)  # type: ignore[arg-type]
        done = run_in_hydra(lambda _: job(), config, "hydra.run.dir", None, context)
        callbacks.on_run_end(config=config, config_name=config.hydra.job.config_name, job_return=done)
    if isinstance(done._return_value, Exception):  # its public property prints a line of its own first
        raise done._return_value


def run_hydra(line: CommandLine, job: SweepJob | None = None) -> None:
    """Hand over to ``hydra.main`` what it alone can do (sweeps, whose points are given to ``job``; --cfg, --info,
    completion), with its errors as exceptions and its own command line in place of ours."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    raised: list[Exception] = []

    def task(config: DictConfig) -> object:
        own = HydraConfig.get()
        overrides = tuple(str(override) for override in own.overrides.task)
        try:
            return job and job(config, Path(own.runtime.output_dir), overrides)
        except Exception as error:
            raised.append(error)
            raise

    entry = hydra.main(version_base="1.3", config_path=str(root() / "conf"), config_name="config")(task)
    argv = sys.argv
    sys.argv = [argv[0], *line.flags, *line.overrides]
    try:
        with environment({"HYDRA_FULL_ERROR": "1", ROOT_VARIABLE: root().as_posix()}), hydra_errors(line):
            entry()
    except UserError as error:
        if error.__cause__ in raised:  # Hydra's kind of error, but raised by the job: a bug, not the user's mistake
            raise error.__cause__ from None
        raise
    finally:
        sys.argv = argv


def environment(variables: Mapping[str, str]) -> AbstractContextManager[None]:
    """A context in which these environment variables are set."""
    from hydra.core.utils import env_override

    return cast(AbstractContextManager[None], env_override(dict(variables)))

"""Hydra's composition: a command line to plain values of our sections, with every mistake in a line of our own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hybridlm.cli.group_files import refuse_code
from hybridlm.config.groups import OF_PLUGINS, ROOT_VARIABLE, groups, no_such_option, root
from hybridlm.config.overrides import CommandLine, key_of, repair, several_values
from hybridlm.errors import ConfigError, UserError
from hybridlm.runs.resume import quoted
from hybridlm.sweep.grid import Axis

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What Hydra and OmegaConf raise at odd values besides errors of their own: within them these are the user's.
_ODD = (AssertionError, AttributeError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError)
_LONGEST = 200_000  # characters of a command line; Hydra's parser takes seconds for more
_DEEPEST = 40  # brackets within one another, each of which is a call of the parser


@dataclass(frozen=True)
class Composition:
    """tree: our sections as plain values; run_dir: as far as it can be told before the run; choices: option by
    group."""

    tree: dict[str, object]
    run_dir: Path | None
    choices: dict[str, str | None]


def composed(line: CommandLine) -> Composition:
    """What a (repaired) command line composes. Nothing it names is run. Raises ConfigError."""
    os.environ[ROOT_VARIABLE] = root().as_posix()
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import open_dict

    _refuse_odd(line)
    overrides = list(line.overrides)
    if extra := config_dir(line):
        places = (Path(extra).resolve(), root())
        overrides.append(f"hydra.searchpath=[{','.join(quoted(f'file://{place.as_posix()}') for place in places)}]")
    with hydra_errors(line, _ODD), initialize_config_dir(config_dir=str(root() / "conf"), version_base="1.3"):
        name = line.value("--config-name", "-cn") or "config"
        config = compose(config_name=name, overrides=overrides, return_hydra_config=True)
        sources = [Path(source.path) for source in config.hydra.runtime.config_sources if source.schema == "file"]
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        loaded = hydra.config_loader.compute_defaults_list(name, overrides, RunMode.RUN).defaults
        refuse_code(
            [(str(one.config_path), one.package or "") for one in loaded],
            sources,
            [key_of(one) for one in line.overrides],
        )
        before = HydraConfig.instance().cfg
        try:
            with open_dict(config):
                config.hydra.runtime.output_dir = str(
                    Path.cwd() / "outputs"
                )  # so that ${hydra:runtime.output_dir} resolves
            HydraConfig.instance().set_config(config)
            choices = {
                str(group): None if option is None else str(option)
                for group, option in config.hydra.runtime.choices.items()
            }
            return Composition(plain_tree(config), _run_dir(config), choices)
        finally:
            HydraConfig.instance().cfg = before


def _run_dir(config: DictConfig) -> Path | None:
    try:
        return Path(str(config.hydra.run.dir))
    except Exception:  # a name that only Hydra can make when the job starts
        return None


def config_dir(line: CommandLine) -> str | None:
    """The folder of Hydra's --config-dir. UserError: there is none."""
    folder = line.value("--config-dir", "-cd")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    return folder


def plain_tree(config: DictConfig) -> dict[str, object]:
    """Our part of Hydra's configuration as plain values, interpolations resolved; ``???`` stays for validation to
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


def is_group(override: str, known: Iterable[str]) -> bool:
    """Whether an override chooses, or takes away, an option of a config group."""
    key = key_of(override)
    return key in known or "/" in key or "@" in key


def _refuse_odd(line: CommandLine) -> None:
    """What Hydra's own parser has no clear word for, or no end."""
    known = groups(config_dir(line))
    for override in line.overrides:
        shown = override.lstrip("+")[:60]
        if len(override) > _LONGEST:
            raise ConfigError(f"{shown}...: longer than {_LONGEST:,} characters")
        if max(_depths(override)) > _DEEPEST:
            raise ConfigError(f"{shown}...: brackets more than {_DEEPEST} deep")
        key, equals, value = override.partition("=")
        name = key.lstrip("+~")
        if name in known and equals and value.strip()[:1] in ("[", "{"):
            raise ConfigError(f"{name}={value[:60]}: expected one option; available: {', '.join(known[name])}")


def _depths(text: str) -> Iterator[int]:
    depth = 0
    yield depth
    for letter in re.findall(r"[\[\](){}]", text):
        depth = depth + 1 if letter in "[({" else max(0, depth - 1)
        yield depth


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
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        known = groups(config_dir(line))
        top = group.partition("/")[0]
        if top in known:  # an option may lie in a folder of the group
            text = no_such_option(top, (error.missing_cfg_file or "").removeprefix(f"{top}/"), known)
        elif group and (error.options is not None or f"{group}/{option}" in OF_PLUGINS):
            text = no_such_option(group, option, {group: list(error.options or ())})
        else:
            text = _one_line(error)
        place = re.match(r"In '([^']+)'", str(error))
        raise ConfigError(
            text if place is None or place[1] in ("config", "hydra/config") else f"{place[1]}: {text}"
        ) from error
    except OverrideParseException as error:
        reason = re.sub(
            r" expecting .*", "", _one_line(error).removeprefix(f"Error parsing override '{error.override}'").strip()
        )
        shown = error.override.lstrip("+")
        raise ConfigError(
            f"{_cut(repr(shown))} cannot be read: {_cut(reason)}; quote a value with special characters:"
            " key='\"value\"'"
        ) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        if (several := several_values(_one_line(error))) is not None:
            raise ConfigError(_cut(several)) from error
        cause = error.__cause__
        raise ConfigError(
            "; ".join(_cut(_one_line(part)) for part in (error, cause) if part is not None and str(part))
        ) from error
    except odd as error:
        raise ConfigError(
            f"these arguments cannot be composed ({_cut(_one_line(error)) or type(error).__name__})"
        ) from error


def _cut(text: str) -> str:
    return text if len(text) <= 400 else text[:397] + "..."


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return re.sub(
        r" *(See https://hydra\S* for details|full_key: \S*|object_type=\S*|reference_type=\S*)", "", text
    ).strip()


def sweep_axes(overrides: Sequence[str]) -> list[Axis]:
    """What these overrides vary, in Hydra's own grammar of sweeps; the last of a key counts. Raises ConfigError."""
    return list(
        {axis.key: axis for axis in axes(CommandLine((), tuple(repair(overrides, groups(), several=True))))}.values()
    )


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

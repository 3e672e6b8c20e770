"""Files of config groups set values only. They must not name anything that Hydra would run (a class, a logging handler,
a callback), because such a file may be untrusted; only conf/hydra/, Hydra's packages and the command line may.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import yaml

from hybridlm.config.groups import root
from hybridlm.errors import UserError

_HARMLESS = {
    "run": {"dir"},
    "sweep": {"dir", "subdir"},
    "job": {"name"},
    "mode": set[str](),
}  # what a file may set of hydra


def refuse_code(loaded: Sequence[tuple[str, str]], sources: Sequence[Path], given: Collection[str]) -> None:
    """Checks every file that a composition loads.

    loaded: (path in the search path, package) of each; sources: the folders of the search path, in order; given: the
    keys of the command line. Raises UserError: a file is outside of them, or names something to run.
    """
    for name, package in loaded:
        if ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise UserError(f"{name}: is outside of the configuration folders")
        path = next((place / f"{name}.yaml" for place in sources if (place / f"{name}.yaml").is_file()), None)
        if path is None or name == "config":
            continue  # of a package; or the primary one, which the command line names
        if name.startswith("hydra/"):
            if path.is_relative_to(root() / "conf") or name.rpartition("/")[0] in given:
                continue
            problem: str | None = "Hydra's settings are read from conf/hydra/ and the command line only"
        elif package.partition(".")[0] == "hydra":
            problem = f"its package is {package}, which only conf/hydra/ and the command line may set"
        else:
            problem = _problem_in(yaml.safe_load(path.read_text(encoding="utf-8")))
        if problem is not None:
            raise UserError(f"{path}: {problem}")


def _problem_in(tree: object) -> str | None:
    if any(str(key).startswith("_target_") for key in _keys(tree)):
        return "_target_: a configuration file must not name code to run"
    hydra = tree.get("hydra") if isinstance(tree, Mapping) else None
    for key, value in hydra.items() if isinstance(hydra, Mapping) else ():
        inner = set(map(str, value)) if isinstance(value, Mapping) else set[str]()
        if key not in _HARMLESS or not inner <= _HARMLESS[key]:
            return f"hydra.{'.'.join([str(key), *sorted(inner)[:1]])}: only conf/hydra/ and the command line may set it"
    dotted = [str(key) for key in tree if str(key).startswith("hydra.")] if isinstance(tree, Mapping) else []
    return f"{dotted[0]}: only conf/hydra/ and the command line may set it" if dotted else None


def _keys(tree: object) -> Iterator[object]:
    """All keys of a tree; shared branches (YAML aliases) are visited once."""
    waiting, seen = [tree], set[int]()
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping | list) and id(node) not in seen:
            seen.add(id(node))
            if isinstance(node, Mapping):
                yield from node
            waiting += node.values() if isinstance(node, Mapping) else node

"""The shape of the code base, read from its syntax trees: imports point one way, names of machines and frameworks stay
in their rooms, files and functions stay short. Each failure lists file:line."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1] / "hybridlm"
# What each room may import of ours, itself aside; `errors` is open to all. A room that is not here fails a test.
MAY_IMPORT: dict[str, set[str]] = {
    "config": {"files"},
    "files": set(),
    "errors": set(),
    "ops": set(),
    "layers": {"ops"},
    "model": {"layers", "ops", "config"},
    "data": {"config", "files"},
    "machine": {"config", "ops", "layers"},
    "runs": {"config", "files", "model", "ops", "machine", "data.tokenizer"},
    "optim": {"config", "ops", "layers", "model", "machine"},
    "memory": {"config", "ops", "layers", "model", "optim", "machine", "data.tokenizer", "files"},
    "generate": {"runs", "data", "model", "machine", "config", "files"},
    "serve": {"generate", "data", "runs", "model", "machine", "config", "files"},
    "report": {"config", "files", "model", "runs", "sweep"},
    "bench": {"generate", "memory", "runs", "model", "config", "machine"},
    "interop": {"config", "data", "files", "layers", "model", "ops", "runs"},
    "eval": {"generate", "data", "runs", "model", "layers", "config", "machine", "files"},
    "sweep": {"config", "files", "runs", "machine", "model", "layers", "memory"},
}
MAY_IMPORT["train"] = {*MAY_IMPORT} - {"bench", "sweep", "interop", "serve"} | {"interop.reach"}
MAY_IMPORT["cli"] = {*MAY_IMPORT}
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT["api"] = {"cli", "config", "data", "generate", "machine", "memory", "model", "runs"}
ENTRY_POINTS = {"cli", "__main__", "api", "__init__"}
THIRD_PARTY_HOMES = {
    "lightning": ("train/", "data/datamodule.py"),
    "pytorch_lightning": (),
    "hydra": ("cli/compose.py", "train/launch.py"),
    "transformers": ("interop/", "data/tokenizer.py"),
    "lm_eval": ("eval/harness.py", "eval/tasks.py"),
    "matplotlib": ("report/",),
    "mamba_ssm": ("ops/kernels/",),
    "causal_conv1d": ("ops/kernels/",),
    "liger_kernel": ("ops/kernels/",),
}
KEYWORDS = {
    ("interop/remote_wrapper.py", "__init__"),  # of a configuration
    ("interop/remote_wrapper.py", "prepare_inputs_for_generation"),
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_FILE, MAX_FUNCTION, MAX_LIGHTNING_MODULE = 300, 60, 149
DEVICE = re.compile(r"(cuda|cpu)(:\d*)?")


class Import(NamedTuple):
    where: str  # file:line, from the package's root
    target: str  # dotted, ours without "hybridlm."
    ours: bool
    typing_only: bool  # under `if TYPE_CHECKING`


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def typing_only_nodes(tree: ast.AST) -> set[int]:
    """Ids of the nodes under ``if TYPE_CHECKING`` (not those under its else)."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
    ]
    return {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}


def modules_named(node: ast.Import | ast.ImportFrom, package: list[str]) -> list[str]:
    """Dotted names of the modules that an import statement reaches; ``from hybridlm import data`` reaches
    hybridlm.data."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    parent = ROOT.parent.joinpath(*module.split("."))
    return [
        f"{module}.{alias.name}"
        if (parent / f"{alias.name}.py").exists() or (parent / alias.name).is_dir() or module == "hybridlm"
        else module
        for alias in node.names
    ]


@cache
def imports_of(path: Path) -> list[Import]:
    tree = tree_of(path)
    quiet = typing_only_nodes(tree)
    package = ["hybridlm", *path.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for target in dict.fromkeys(modules_named(node, package)):
                ours = target.split(".")[0] == "hybridlm"
                found.append(
                    Import(f"{name_of(path)}:{node.lineno}", target.removeprefix("hybridlm."), ours, id(node) in quiet)
                )
    return found


def every_import() -> Iterator[tuple[Path, Import]]:
    for path in files():
        for item in imports_of(path):
            yield path, item


def report(wrong: list[str]) -> None:
    assert not wrong, "\n" + "\n".join(wrong)


def within(target: str, allowed: set[str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


def third_party(target: str) -> bool:
    return target.split(".")[0] not in sys.stdlib_module_names


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in files()} - {"__init__"}
    report(sorted(rooms - MAY_IMPORT.keys()))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_is_below_it(room):
    wrong = [
        f"{item.where}: {room} imports hybridlm.{item.target}"
        for path, item in every_import()
        if room_of(path) == room
        and item.ours
        and not within(item.target, MAY_IMPORT[room] | {room, "errors"})
        # config's types may be named anywhere; importing them at run time is another test's matter
        and not (item.typing_only and within(item.target, {"config"}))
    ]
    report(wrong)


def test_nothing_imports_train_or_an_entry_point_but_entry_points():
    wrong = [
        f"{item.where}: imports hybridlm.{item.target}"
        for path, item in every_import()
        if item.ours and room_of(path) not in ENTRY_POINTS
        if within(item.target, (ENTRY_POINTS | {"train"}) - {room_of(path)})
    ]
    report(wrong)


def test_config_knows_no_torch():
    report(
        [
            item.where
            for path, item in every_import()
            if room_of(path) == "config" and within(item.target, {"torch", "lightning", "hydra"})
        ]
    )


@pytest.mark.parametrize("room", ["ops", "layers", "model"])
def test_the_core_needs_torch_only(room):
    """So that it can be shipped by itself."""
    report(
        [
            f"{item.where}: {item.target}"
            for path, item in every_import()
            if room_of(path) == room
            and not item.ours
            and third_party(item.target)
            and not within(item.target, {"torch"})
            and "/kernels/" not in item.where
        ]
    )


def test_the_core_names_config_types_only():
    """At run time layers and blocks read the attributes of the spec they are given, whatever its class."""
    wrong = [
        f"{item.where}: imports hybridlm.{item.target} at run time"
        for path, item in every_import()
        if room_of(path) in {"ops", "layers", "model"}
        and item.ours
        and within(item.target, {"config"})
        and not item.typing_only
    ]
    report(wrong)


@pytest.mark.parametrize("package", THIRD_PARTY_HOMES)
def test_a_framework_stays_in_its_rooms(package):
    wrong = [
        f"{item.where}: imports {item.target}"
        for path, item in every_import()
        if not item.ours and within(item.target, {package}) and not name_of(path).startswith(THIRD_PARTY_HOMES[package])
    ]
    report(wrong)


def device_strings(path: Path) -> Iterator[int]:
    """Lines with a device's name as a string, the legal values of a field aside (``Literal["cpu", "cuda"]``)."""
    tree = tree_of(path)
    literals = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in {"Literal", "typing.Literal"}
    ]
    exempt = {id(inner) for literal in literals for inner in ast.walk(literal)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and DEVICE.fullmatch(node.value)
            and id(node) not in exempt
        ):
            yield node.lineno


def test_device_names_stay_in_machine():
    report(
        [f"{name_of(path)}:{line}" for path in files() if room_of(path) != "machine" for line in device_strings(path)]
    )


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    report([f"{name}:{length} lines, at most {MAX_FILE}" for name, length in lengths.items() if length > MAX_FILE])


def test_functions_are_short():
    wrong = []
    for path in files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    wrong.append(f"{name_of(path)}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION}")
    report(wrong)


def test_the_lightning_module_only_wires():
    homes = []
    for path in files():
        classes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)]
        if any("LightningModule" in ast.unparse(base) for node in classes for base in node.bases):
            homes.append(path)
    assert len(homes) == 1, homes
    (path,) = homes
    length = len(path.read_text(encoding="utf-8").splitlines())
    report([f"{name_of(path)}:{length} lines, at most {MAX_LIGHTNING_MODULE}"] if length > MAX_LIGHTNING_MODULE else [])


def test_no_file_or_folder_is_named_after_nothing():
    report(
        [
            name_of(path)
            for path in files()
            if {part.removesuffix(".py") for part in path.relative_to(ROOT).parts} & FORBIDDEN_NAMES
        ]
    )


def test_no_function_takes_arbitrary_keywords():
    """A misspelt argument must be an error. transformers calls what it subclasses with arguments of its own."""
    report(
        [
            f"{name_of(path)}:{node.lineno} {node.name}(**{node.args.kwarg.arg})"
            for path in files()
            for node in ast.walk(tree_of(path))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.args.kwarg is not None
            if (name_of(path), node.name) not in KEYWORDS
        ]
    )


def test_no_star_imports():
    report(
        [
            f"{name_of(path)}:{node.lineno}"
            for path in files()
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
        ]
    )

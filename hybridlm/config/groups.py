"""Where conf/ and experiments/ are, and their groups and options."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

ROOT_VARIABLE = "HYBRIDLM_ROOT"  # conf/config.yaml reads it to find experiments/

NESTED = ("model/style",)  # groups inside of others
OF_PLUGINS = (
    "hydra/launcher/joblib",
    "hydra/launcher/submitit_local",
    "hydra/launcher/submitit_slurm",
    "hydra/sweeper/optuna",
)


def root() -> Path:
    """The folder of conf/ and experiments/: the checkout, if the package is in one, otherwise the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    return (
        checkout
        if (checkout / "pyproject.toml").is_file() and (checkout / "conf" / "config.yaml").is_file()
        else package
    )


def groups(extra: str | None = None) -> dict[str, list[str]]:
    """The config groups with their options; ``extra``: the folder of Hydra's --config-dir. A subfolder holds more
    options of its group (``experiments=mine/first``), or is a group of its own if it is in ``NESTED``
    (``model/style=portable``)."""
    found: dict[str, list[str]] = {"experiments": [], **{group: [] for group in NESTED}}
    places = [*(root() / "conf").iterdir(), root() / "experiments"]
    if extra and Path(extra).is_dir():
        places += Path(extra).iterdir()
    for place in places:
        if place.is_dir() and place.name != "hydra":
            for path in place.rglob("*.yaml"):
                option = path.relative_to(place.parent).with_suffix("").as_posix()
                group = next((group for group in NESTED if option.startswith(f"{group}/")), place.name)
                found.setdefault(group, []).append(option.removeprefix(f"{group}/"))
    return {group: sorted(set(options)) for group, options in sorted(found.items())}


def no_such_option(group: str, option: str, options: Mapping[str, list[str]]) -> str:
    """The line about an unknown option of a group, with the most similar one and all that exist."""
    if f"{group}/{option}" in OF_PLUGINS:
        return f"{group}={option}: its Hydra plugin is not installed; pip install 'hybridlm[sweep]'"
    known = options.get(group, [])
    close = get_close_matches(option, known, n=1, cutoff=0.5)
    hint = f"did you mean {group}={close[0]}? " if close else ""
    return f"{group}={option}: no such option; {hint}available: {', '.join(known) or 'none'}"

"""Arguments of the verbs that need more than a type: lists, overrides, and the configurations they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typer.main import get_command

from hybridlm.cli.app import app
from hybridlm.config.overrides import key_of, merged, pieces, quoted, refuse_flags
from hybridlm.errors import UserError
from hybridlm.runs.resume import recorded
from hybridlm.runs.run_folder import find_run

if TYPE_CHECKING:
    from hybridlm.config.data import DataConfig
    from hybridlm.config.run import RunConfig

_MOST = 1_000_000_000  # tokens, or rows


def overrides_of(verb: str, overrides: list[str] | None) -> list[str]:
    """The overrides of a verb, once checked for flags of other commands."""
    given = list(overrides or [])
    options: Any = get_command(app).commands[verb]  # type: ignore[attr-defined]
    own = [option.opts[0] for option in options.params if option.opts[0].startswith("--")]
    refuse_flags(given, (), f"{', '.join(own)}, --help and the overrides of train.py")
    return given


def words(text: str | None) -> tuple[str, ...]:
    return tuple(word for word in (text or "").replace(",", " ").split())


def numbers(option: str, text: str | None, example: str) -> tuple[int, ...]:
    """A list such as 512,2048. UserError: an item is not a whole number from 1 to ``_MOST``."""
    given = [] if text is None else text.split(",")
    wrong = [word for word in given if not word.strip().isdecimal() or not 1 <= int(word) <= _MOST]
    if wrong:
        raise UserError(
            f"{option} {text!r}: {wrong[0].strip()!r} is not a whole number from 1 to {_MOST:,}; expected for example"
            f" {example}"
        )
    return tuple(int(word) for word in given)


def models(given: list[str], compare: str | None) -> tuple[str | None, dict[str, RunConfig]]:
    """The run to measure, if one is named, and configurations of untrained models by name: one for each pattern to
    compare, otherwise that of the overrides."""
    from hybridlm.cli.compose import compose_config

    run = given[0] if given and "=" not in given[0] else None
    if run is not None and len(given) > 1:
        raise UserError(f"bench: {given[1]}: a trained run takes no overrides; use --compare for other patterns")
    base, overrides = (None, given) if run is None else (recorded(find_run(run)[0]), [])
    patterns = [] if compare is None else [piece.strip() for piece in pieces(compare)]
    if compare is not None and not all(patterns):
        raise UserError(f"--compare {compare}: an empty pattern; expected for example T,TM,MMMT")
    configs = {pattern: compose_config(merged(overrides, [f"model.pattern={pattern}"]), base) for pattern in patterns}
    if run is None and not configs:
        config = compose_config(overrides)
        configs = {config.model.name: config}
    return run, configs


def other_data(run: str, overrides: list[str]) -> DataConfig:
    """The data section of a run with ``overrides``, or a new one where they choose one (``data=...``). The tokenizer
    stays the run's."""
    from hybridlm.cli.compose import compose_config

    if wrong := [line for line in overrides if key_of(line).partition(".")[0] != "data"]:
        raise UserError(f"eval: {wrong[0]}: only the data can be changed (data=..., data.FIELD=...)")
    folder, _ = find_run(run)
    anew = any(key_of(line) == "data" for line in overrides)
    base = recorded(folder)
    generated = not anew and base.data.source == "synthetic"  # a synthetic task has its own tokens
    if generated or any(line.removeprefix("+") == "data=synthetic" for line in overrides):
        return compose_config(overrides, base).data
    tokens = base.data.tokenizer.model_copy(
        update={"kind": "file", "path": str(folder.tokenizer.absolute()), "special_tokens": ()}
    )
    base = base.model_copy(update={"data": base.data.model_copy(update={"tokenizer": tokens})})
    own = ["data.tokenizer.kind=file", f"data.tokenizer.path={quoted(folder.tokenizer.absolute())}"] if anew else []
    return compose_config(merged(own, overrides), base).data

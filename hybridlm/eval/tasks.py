"""Tasks of lm-evaluation-harness by name: found, loaded and run, with one line where that cannot be done."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.lm import HybridLM

_BOOTSTRAPS = 1000  # resamples for the error of metrics that are no mean
_SEED = 1234  # of the examples in front, as in the harness
_LONG = 240  # characters of others' messages


def load_tasks(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """The harness's tasks and groups of these names, their data read, as its ``evaluate`` wants them.

    ConfigError: one is not known, or cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-evaluation-harness is not installed; pip install 'hybridlm[eval]'")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder; expected one with the YAML files of tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(names, include_path)

    from hybridlm.data.reading.hub_access import hub_answers, quiet

    offline = not hub_answers()
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with quiet(offline):
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:  # of any library that reads data, and whatever the code of a task raises
                raise _refusal(name, error, offline) from error
            for kind, items in found.items():
                items.update(loaded[kind])
    return found


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """One that knows all ``names``; reading the harness's own thousands of tasks takes seconds, which tasks of the
    user's spare."""
    from lm_eval.tasks import TaskManager

    own = None if include_path is None else str(include_path)
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=own)
    problems = []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=4, cutoff=0.6)
            said = (
                f"did you mean {', '.join(near)}?"
                if near
                else "lm_eval ls tasks lists them; --include-path names a folder of your own"
            )
            problems.append(f"--tasks {name}: unknown task; {said}")
    if problems:
        raise UserError(problems)
    return manager


def _refusal(name: str, error: Exception, offline: bool) -> UserError:
    text = " ".join(str(error).split())[:_LONG] or type(error).__name__
    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    if offline and any(isinstance(one, OSError) and not isinstance(one, FileNotFoundError) for one in causes):
        return UserError(
            f"--tasks {name}: its data are not in the cache and the hub cannot be reached ({text}); go online once, or"
            " run a task with files of your own (--include-path)"
        )
    return UserError(f"--tasks {name}: cannot be loaded ({type(error).__name__}: {text})")


def run_tasks(
    model: HybridLM,
    tokenizer: Tokenizer,
    tasks: dict[str, Any],
    max_length: int,
    batch: int,
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, dict[str, float]]:
    """Metrics of each task and group by name, as the harness computes them; NAME_stderr is the error of NAME, and a
    filter other than "none" stands behind a comma. ConfigError: a task asks for what is not there."""
    from lm_eval.evaluator import evaluate

    from hybridlm.data.reading.hub_access import quiet
    from hybridlm.eval.harness import HarnessLM

    for task in tasks["tasks"].values():  # as the harness's own simple_evaluate does
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None or own == 0 else num_fewshot)
        task.set_fewshot_seed(seed=_SEED)
    harness = HarnessLM(model, tokenizer, max_length=max_length, batch=batch)
    with quiet(offline=True):  # all data have been read; metrics of the hub are not fetched in the middle
        try:
            found = evaluate(harness, tasks, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"--tasks: {type(error).__name__}: {' '.join(str(error).split())[:_LONG]}") from error
    assert found is not None  # this is the only process
    return {name: _flat(values) | _examples(found, name) for name, values in found["results"].items()}


def _flat(values: dict[str, Any]) -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            flat[name if chosen == "none" else key] = float(value)
    return flat


def _examples(found: dict[str, Any], name: str) -> dict[str, float]:
    counts = found.get("n-samples", {}).get(name)
    return {"examples": counts["effective"]} if counts else {}

"""Tasks of lm-evaluation-harness by name: found, loaded and run, with one line where that is not possible."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.data.reading import hub_access
from hybridlm.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.lm import HybridLM

_BOOTSTRAPS = 1000  # resamples for the standard error of metrics that are not means
_SEED = 1234  # of the few-shot examples, as in the harness
_LONG = 240  # characters of another library's message


def load_tasks(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """The harness's tasks and groups with these names, their data loaded, as its ``evaluate`` takes them. UserError:
    one is unknown, or cannot be loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-evaluation-harness is not installed; pip install 'hybridlm[eval]'")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder; expected one with YAML task files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(names, include_path)
    offline = not hub_access.hub_answers()
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with hub_access.quiet(offline):
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:  # of any library that reads data, or of the task's own code
                hint = "; the Hugging Face hub is unreachable: only local and cached data can be used"
                raise UserError(
                    f"--tasks {name}: cannot be loaded ({_shortened(error)}){hint if offline else ''}"
                ) from error
            for kind, items in found.items():
                items.update(loaded[kind])
    return found


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """One that knows all ``names``. Indexing the harness's own 14,000 tasks takes seconds, so that is left out where
    the user's folder has them all."""
    from lm_eval.tasks import TaskManager

    own = None if include_path is None else str(include_path)
    try:
        manager = TaskManager(include_path=own, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=own)
    except Exception as error:  # of the YAML library, or of the harness, for a file that is not a task
        raise UserError(f"--include-path {include_path}: cannot be read ({_shortened(error)})") from error
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError([f"--tasks {name}: unknown task; {_hint(name, manager.all_tasks)}" for name in unknown])
    return manager


def _hint(name: str, known: list[str]) -> str:
    near = ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.6))
    return f"did you mean {near}?" if near else "`lm_eval ls tasks` lists them; --include-path adds your own"


def _shortened(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONG]


def run_tasks(
    model: HybridLM,
    tokenizer: Tokenizer,
    tasks: dict[str, Any],
    max_length: int,
    batch: int,
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, dict[str, float]]:
    """Metrics of each task and group by name, as the harness computes them: NAME_stderr is the standard error of NAME,
    and a filter other than "none" follows after a comma. UserError: a task asks for something that is not available."""
    from lm_eval.evaluator import evaluate

    from hybridlm.eval.harness import HarnessLM

    for task in tasks["tasks"].values():  # as the harness's own simple_evaluate does
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None or own == 0 else num_fewshot)
        task.set_fewshot_seed(seed=_SEED)
    harness = HarnessLM(model, tokenizer, max_length=max_length, batch=batch)
    with hub_access.quiet(offline=True):  # all data are loaded; metrics are not downloaded halfway
        try:
            found = evaluate(harness, tasks, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"--tasks: {_shortened(error)}") from error
    assert found is not None  # this is the only process
    counts = found.get("n-samples", {})
    return {
        name: _flat(values) | ({"examples": counts[name]["effective"]} if counts.get(name) else {})
        for name, values in found["results"].items()
    }


def _flat(values: dict[str, Any]) -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            flat[name if chosen == "none" else key] = float(value)
    return flat

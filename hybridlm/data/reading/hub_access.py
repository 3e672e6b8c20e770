"""Whether the hub answers, keeping its libraries quiet, and their errors as one line with a remedy."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hybridlm.config.data import HfConfig
from hybridlm.data.keep import keep_json, kept_json
from hybridlm.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_PATIENCE = 4.0  # seconds for the hub to answer at all
_LONG = 300  # characters of others' messages
_NETWORK = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "socket", "urllib3"}


@dataclass(frozen=True)
class Access:
    """State of the hub. commit: of the revision, or the one last seen; offline: why the hub cannot be asked, or
    empty."""

    commit: str | None = None
    offline: str = ""


def ask_hub(config: HfConfig, cache: Path) -> Access:
    """One request, answered or given up within seconds. cache: where the commits seen are kept.

    UserError: the hub answers, and refuses the data set.
    """
    from huggingface_hub import HfApi, errors

    name, kept = str(config.id), cache / "hub" / "commits.json"
    seen, key = kept_json(kept), f"{config.id}@{config.revision or ''}"
    if _switched_off():
        return Access(seen.get(key), "HF_HUB_OFFLINE is set")

    def ask() -> str | None:
        info = HfApi().dataset_info(name, revision=config.revision, timeout=_PATIENCE, expand=["sha", "gated"])
        if info.gated:
            HfApi().auth_check(name, repo_type="dataset")
        return info.sha

    try:
        commit = _within(_PATIENCE, ask)
    except Exception as error:  # which library speaks HTTP has changed and will change
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, errors.HFValidationError) or (400 <= status < 500 and status not in (408, 429)):
            raise refusal(config, error) from error
        reason = f"no answer within {_PATIENCE:g} s" if isinstance(error, TimeoutError) else _shortened(_words(error))
        log.warning("data.hf.id=%s: cannot reach the hub (%s); looking for a copy in the cache", name, reason)
        return Access(seen.get(key), reason)
    if seen.get(key) != commit:
        keep_json(kept, seen | {key: commit})
    return Access(commit)


def hub_answers() -> bool:
    """Whether the hub can be reached, found out within seconds; its own libraries retry for half a minute."""
    from huggingface_hub import constants, get_session

    if _switched_off():
        return False
    try:
        _within(_PATIENCE, lambda: get_session().head(constants.ENDPOINT, timeout=_PATIENCE))
    except Exception:  # whichever library speaks HTTP
        return False
    return True


def _switched_off() -> bool:
    import datasets
    from huggingface_hub import constants

    return bool(datasets.config.HF_HUB_OFFLINE or constants.is_offline_mode())


def _within(seconds: float, ask: Callable[[], _T]) -> _T:
    """TimeoutError: no answer yet. In a thread, since resolving a host name has no timeout of its own."""
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(timeout=seconds)


@contextmanager
def quiet(offline: bool = False) -> Iterator[None]:
    """Silences the libraries, whose errors are reported in one line here; progress bars only on a terminal, where a
    long download should show. offline: they do not try the network."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging

    loggers: list[Any] = [datasets.logging, hub_logging]
    switches: list[Any] = [datasets.config, constants]
    levels = [logger.get_verbosity() for logger in loggers]
    before = [module.HF_HUB_OFFLINE for module in switches]
    # With their own environment variables set, these calls do nothing but warn.
    free = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    barred = [
        module
        for module in (datasets, huggingface_hub.utils)
        if free and not sys.stderr.isatty() and not module.are_progress_bars_disabled()
    ]
    try:
        for logger in loggers:
            logger.set_verbosity(logging.CRITICAL)
        for module in switches if offline else ():
            module.HF_HUB_OFFLINE = True
        for library in barred:
            library.disable_progress_bars()
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value
        for library in barred:
            library.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)


def unreachable(config: HfConfig, reason: str, cache: str) -> str:
    return (
        f"data.hf.id={config.id}: cannot reach the hub ({reason}) and {cache}: go online for the first start, or set"
        " data.hf.id to a local folder of .jsonl, .parquet or .csv files"
    )


def refusal(config: HfConfig, error: Exception) -> UserError:
    """What the libraries raised, as one line with a remedy."""
    from huggingface_hub import errors

    where, whole = f"data.hf.id={config.id}", _words(error)
    text = _shortened(whole)
    listed = re.search(r"[Aa]vailable(?: configs)?: \[(.*?)\]", whole)
    if isinstance(error, UserError):
        return error
    if isinstance(error, errors.GatedRepoError) or "gated dataset" in text:
        return UserError(
            f"{where} is gated: accept its terms on its page on the hub, then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"data.hf.revision={config.revision}: {where} has no such branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{where}: the hub has no such data set, or it is private and needs HF_TOKEN to be set")
    if "scripts are no longer supported" in text:
        return UserError(
            f"{where} needs its own code to be run, which is never done: data.hf.revision=refs/convert/parquet takes"
            " the hub's Parquet copy of it, if there is one"
        )
    if listed:
        legal = _shortened(listed[1].replace("'", ""))
        return ConfigError(f"data.hf.name={config.name or 'null'}: {where} has {legal}")
    if _is_network(error):
        return UserError(f"{where}: the network failed ({text}); run the same command again, finished work is kept")
    if any(isinstance(one, StopIteration) for one in _causes(error)):  # how datasets reports it
        return UserError(f"{where} cannot be read: its files are empty")
    return UserError(f"{where} cannot be read: {text}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_network(error: BaseException) -> bool:
    return any(
        isinstance(one, (ConnectionError, TimeoutError)) or type(one).__module__.split(".")[0] in _NETWORK
        for one in _causes(error)
    )


def _words(error: BaseException) -> str:
    """The message of the innermost cause that has one."""
    messages = [text for one in _causes(error) if (text := " ".join(str(one).split()))]
    return messages[-1] if messages else type(error).__name__


def _shortened(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]} ..."

"""Whether the hub answers, silence while its libraries work, and their errors as one line that says what to do."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm.config.data import HfConfig
from hybridlm.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_PATIENCE = 4.0  # seconds for the hub to answer at all
_LONG = 300  # characters of others' messages
_NETWORK = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "socket", "urllib3"}


@dataclass(frozen=True)
class Access:
    """What the hub has. commit: that of the revision, or the one last seen; offline: why the hub cannot be asked, or
    empty."""

    commit: str | None = None
    offline: str = ""


def ask_hub(config: HfConfig) -> Access:
    """One question, answered or given up within seconds. ConfigError: the hub answers, and will not give the data
    set."""
    import datasets
    from huggingface_hub import HfApi, constants, errors, hf_hub_download

    if datasets.config.HF_HUB_OFFLINE or constants.is_offline_mode():
        return Access(_last_seen(config), "HF_HUB_OFFLINE is set")
    name = str(config.id)

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
        reason = f"no answer within {_PATIENCE:g} s" if isinstance(error, TimeoutError) else _cut(_words(error))
        log.warning("data.hf.id=%s: the hub cannot be reached (%s), looking for a copy in the cache", name, reason)
        return Access(_last_seen(config), reason)
    with suppress(Exception):  # only leaves a note of the commit in the hub's cache, which _last_seen reads
        hf_hub_download(name, "README.md", repo_type="dataset", revision=config.revision)
    return Access(commit)


def hub_answers() -> bool:
    """Whether the hub can be asked at all, found out within seconds; its libraries try for half a minute."""
    import datasets
    from huggingface_hub import constants, get_session

    if datasets.config.HF_HUB_OFFLINE or constants.is_offline_mode():
        return False
    try:
        _within(_PATIENCE, lambda: str(get_session().head(constants.ENDPOINT, timeout=_PATIENCE)))
    except Exception:  # whichever library speaks HTTP
        return False
    return True


def _within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """TimeoutError: no answer yet. A thread, since looking up a host's name knows no limit of its own."""
    answer: Future[str | None] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(timeout=seconds)


def _last_seen(config: HfConfig) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    revision = config.revision or "main"
    note = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=str(config.id), repo_type="dataset"), "refs", revision)
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else note.read_text().strip() if note.is_file() else None


@contextmanager
def quiet(offline: bool) -> Iterator[None]:
    """No word of the libraries, whose errors are told in one line here; bars only on a terminal, where a long download
    should show.

    offline: neither of them tries the network.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging

    switches: list[tuple[Any, str]] = [(datasets.config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    levels = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    # Their own environment variables come first, and against them these calls do nothing but warn.
    free = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    barred = [
        module for module in (datasets, huggingface_hub.utils) if free and not module.are_progress_bars_disabled()
    ]
    try:
        datasets.logging.set_verbosity(logging.CRITICAL)
        hub_logging.set_verbosity(logging.CRITICAL)
        for module, name in switches if offline else ():
            setattr(module, name, True)
        for library in barred if not sys.stderr.isatty() else ():
            library.disable_progress_bars()
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
        for library in barred:
            library.enable_progress_bars()
        datasets.logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])


def unreachable(config: HfConfig, reason: str, cache: str) -> str:
    return (
        f"data.hf.id={config.id}: the hub cannot be reached ({reason}) and {cache}: go online for the first start, "
        "or name a local folder with .jsonl, .parquet or .csv files in data.hf.id"
    )


def refusal(config: HfConfig, error: Exception, access: Access | None = None) -> UserError:
    """What the libraries raised, as one line that says what to do."""
    from huggingface_hub import errors

    where, whole = f"data.hf.id={config.id}", _words(error)
    text = _cut(whole)
    listed = re.search(
        r"(?:Available(?: configs in the cache)?|available configs): \[(.*?)\]|configurations in the cache: (.*?)"
        r" Please",
        whole,
    )
    if isinstance(error, UserError):
        return error
    if isinstance(error, errors.GatedRepoError) or "gated dataset" in text:
        return UserError(
            f"{where} is gated: accept its terms on its page at the hub, then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"data.hf.revision={config.revision}: {where} has no such branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{where}: the hub has no such data set, or it is private, and then HF_TOKEN has to be set")
    if "scripts are no longer supported" in text:
        return UserError(
            f"{where} comes with code that would have to be run to read it, which is never done: "
            "data.hf.revision=refs/convert/parquet takes the hub's own copy of it, if it made one"
        )
    if listed:
        legal = _cut((listed[1] or listed[2]).replace("'", ""))
        return ConfigError(
            f"data.hf.name={config.name or 'null'}: {where} has"
            f" {legal}{' in the cache' if access and access.offline else ''}"
        )
    if access and access.offline:
        return UserError(unreachable(config, access.offline, "the data set is not in the cache"))
    if _is_network(error):
        return UserError(f"{where}: the network failed ({text}); run the same command again, what is finished is kept")
    if any(isinstance(one, StopIteration) for one in _causes(error)):  # how datasets says so
        return UserError(f"{where} cannot be read: there is nothing in its files")
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
    """What the first cause that says anything says."""
    said = [text for one in _causes(error) if (text := " ".join(str(one).split()))]
    return said[-1] if said else type(error).__name__


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]} ..."

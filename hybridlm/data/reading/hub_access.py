"""Whether the hub answers, keeping its libraries quiet, and their errors as one line with a remedy."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from hybridlm.config.data import HfConfig
from hybridlm.data.keep import keep_json, kept_json
from hybridlm.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_PATIENCE = 4.0  # seconds for the hub to answer at all
_LONG = 300  # characters of others' messages
_NETWORK = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "socket", "urllib3"}


@dataclass(frozen=True)
class Access:
    """Where a data set is. source: owner/name on the hub, or a local folder; revision: the commit on the hub to read,
    None for a folder; state: that commit, the one last seen, or the hash of the folder. offline: why the hub cannot be
    asked, or empty."""

    source: str
    revision: str | None = None
    state: str | None = None
    offline: str = ""


def ask_hub(config: HfConfig, cache: Path) -> Access:
    """One request, answered or given up within seconds. cache: where the commits seen are kept.

    UserError: the hub answers, and refuses the data set.
    """
    from huggingface_hub import HfApi, errors

    name, kept = str(config.id), cache / "hub" / "commits.json"
    seen, key = kept_json(kept), f"{config.id}@{config.revision or ''}"
    if _switched_off():
        return Access(name, state=seen.get(key), offline="HF_HUB_OFFLINE is set")
    try:
        info = HfApi().dataset_info(name, revision=config.revision, timeout=_PATIENCE, expand=["sha", "gated"])
        if info.gated:
            HfApi().auth_check(name, repo_type="dataset")
    except Exception as error:  # which library speaks HTTP has changed and will change
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, errors.HFValidationError) or (400 <= status < 500 and status not in (408, 429)):
            raise refusal(config, error) from error
        reason = shorten(_words(error), _LONG)
        log.warning("data.hf.id=%s: cannot reach the hub (%s); looking for a copy in the cache", name, reason)
        return Access(name, state=seen.get(key), offline=reason)
    if seen.get(key) != info.sha:
        keep_json(kept, seen | {key: info.sha})
    return Access(name, info.sha, info.sha)


def hub_answers() -> bool:
    """Whether the hub can be reached, found out within seconds; its own libraries retry for half a minute."""
    from huggingface_hub import constants, get_session

    if _switched_off():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # whichever library speaks HTTP
        return False
    return True


def _switched_off() -> bool:
    import datasets
    from huggingface_hub import constants

    return bool(datasets.config.HF_HUB_OFFLINE or constants.is_offline_mode())


@contextmanager
def quiet(offline: bool = False) -> Iterator[None]:
    """Silences the libraries, whose errors are reported in one line here; progress bars only on a terminal, where a
    long download should show. offline: they do not try the network."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging

    module: Any
    with ExitStack() as restored:
        for module in (datasets.logging, hub_logging):
            restored.callback(module.set_verbosity, module.get_verbosity())
            module.set_verbosity(logging.CRITICAL)
        for module in (datasets.config, constants) if offline else ():
            restored.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
            module.HF_HUB_OFFLINE = True
        for module in () if sys.stderr.isatty() else (datasets, huggingface_hub.utils):
            if not module.are_progress_bars_disabled():
                restored.callback(module.enable_progress_bars)
                module.disable_progress_bars()
        yield


def unreachable(config: HfConfig, reason: str, cache: str) -> UserError:
    return UserError(
        f"data.hf.id={config.id}: cannot reach the hub ({reason}) and {cache}: go online for the first start, or set"
        " data.hf.id to a local folder of .jsonl, .parquet or .csv files"
    )


def refusal(config: HfConfig, error: Exception) -> UserError:
    """What the libraries raised, as one line with a remedy."""
    from huggingface_hub import errors

    where, whole, causes = f"data.hf.id={config.id}", _words(error), [type(one) for one in _causes(error)]
    listed = re.search(r"[Aa]vailable(?: configs)?: \[(.*?)\]", whole)
    names = shorten(listed[1].replace("'", ""), _LONG) if listed else ""
    text = shorten(whole, _LONG)
    of_network = [kind for kind in causes if kind.__module__.split(".")[0] in _NETWORK]
    known: list[tuple[object, type[UserError], str]] = [
        (
            isinstance(error, errors.GatedRepoError) or "gated dataset" in whole,
            UserError,
            f"{where} is gated: accept its terms on its page on the hub, then set HF_TOKEN to a token of that account",
        ),
        (
            isinstance(error, errors.RevisionNotFoundError),
            ConfigError,
            f"data.hf.revision={config.revision}: {where} has no such branch, tag or commit",
        ),
        (
            isinstance(error, errors.RepositoryNotFoundError),
            UserError,
            f"{where}: the hub has no such data set, or it is private and needs HF_TOKEN to be set",
        ),
        (
            "scripts are no longer supported" in whole,
            UserError,
            f"{where} needs its own code to be run, which is never done: data.hf.revision=refs/convert/parquet takes"
            " the hub's Parquet copy of it, if there is one",
        ),
        (listed, ConfigError, f"data.hf.name={config.name or 'null'}: {where} has {names}"),
        (
            of_network or any(issubclass(kind, (ConnectionError, TimeoutError)) for kind in causes),
            UserError,
            f"{where}: the network failed ({text}); run the same command again, finished work is kept",
        ),
        # How datasets reports it.
        (StopIteration in causes, UserError, f"{where} cannot be read: its files are empty"),
        (True, UserError, f"{where} cannot be read: {text}"),
    ]
    if isinstance(error, UserError):
        return error
    return next(kind(line) for applies, kind, line in known if applies)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _words(error: BaseException) -> str:
    """The message of the innermost cause that has one."""
    messages = [text for one in _causes(error) if (text := " ".join(str(one).split()))]
    return messages[-1] if messages else type(error).__name__

"""`hybridlm serve`: a trained run behind HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from hybridlm.data.chat import template_of
from hybridlm.errors import UserError
from hybridlm.files.plain import Unreadable, read_text
from hybridlm.generate.loading import trained_length
from hybridlm.machine.device import inference_device
from hybridlm.runs.checkpoint import LoadedRun, load_run
from hybridlm.serve.app import build_app
from hybridlm.serve.desk import Desk
from hybridlm.serve.guard import Guard
from hybridlm.serve.limits import Limits
from hybridlm.serve.prompts import Prompts
from hybridlm.serve.server import Server, listening

_LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


def run_serve(
    name: str, limits: Limits, *, host: str, port: int, keys: Path | None, origins: Sequence[str], ema: bool
) -> None:
    """Serves until it is told to end. limits.context: 0: that of training. UserError: the run, the keys or the address
    cannot be used."""
    secrets = read_keys(keys)
    run = load_run(name, inference_device(), ema=ema)
    limits = replace(limits, context=limits.context or trained_length(run.folder) or 0)
    if limits.context < 2:
        raise UserError(f"{run.folder.config}: the training window (data.seq_len) is unknown; give --context N")
    with listening(host, port) as sock:
        name = f"[{host}]" if ":" in host else host
        app, guard = served(run, limits, secrets, (*_LOOPBACK, name) if is_loopback(host) else (), origins)
        where = f"http://{name}:{sock.getsockname()[1]}"
        print(f"{run.folder.path.name}, step {run.step:,}: {where} (API: {where}/v1); Ctrl-C to stop", flush=True)
        Server(app, guard).run([sock])


def served(
    run: LoadedRun, limits: Limits, keys: Sequence[str] = (), hosts: Sequence[str] = (), origins: Sequence[str] = ()
) -> tuple[ASGIApp, Guard]:
    """The application with all that stands before it. hosts: as ``Guard`` takes them; origins: of other sites' pages
    that may call it."""
    template = template_of(run.tokenizer) if run.folder.chat_template.is_file() else None
    desk = Desk(run, limits)
    prompts = Prompts(
        run.folder.path.absolute().name,
        int(run.checkpoint.stat().st_mtime),
        run.tokenizer,
        template,
        run.model.vocab_size,
        limits.context,
    )
    guard = Guard(build_app(desk, prompts), limits, keys, hosts, desk.metrics)
    if not origins:
        return guard, guard
    return CORSMiddleware(guard, origins, allow_methods=["GET", "POST"], allow_headers=["*"]), guard


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach it."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def read_keys(path: Path | None) -> list[str]:
    """The API keys, one per line or separated by commas, in the file or, without one, in ``$HYBRIDLM_API_KEYS``; none:
    the server asks for none. UserError: the file cannot be read, or contains none."""
    origin = "$HYBRIDLM_API_KEYS" if path is None else f"--api-keys {path}"
    try:
        text = os.environ.get("HYBRIDLM_API_KEYS") if path is None else read_text(path)
    except Unreadable as error:
        raise UserError(f"{origin}: {error}") from None
    if text is None:
        return []
    keys = text.replace(",", "\n").split()
    if not keys:
        raise UserError(f"{origin}: contains no keys; expected one per line")
    return keys

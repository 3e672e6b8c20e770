"""The verb that puts a trained run behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli.app import EMA, Run, app
from hybridlm.cli.trained import Context
from hybridlm.cli.user_error import reported
from hybridlm.serve.limits import Limits


@app.command()
def serve(
    run: Run,
    host: Annotated[str, typer.Option("--host", help="address to listen on; 0.0.0.0: every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option("--api-keys", help="file of API keys, one per line (default: $HYBRIDLM_API_KEYS, or none)"),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="let pages of this site call the server; repeatable"),
    ] = None,
    context: Context = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="maximum number of answers generated at once")
    ] = Limits.batch,
    queue: Annotated[int, typer.Option("--queue", min=1, help="maximum number of answers waiting")] = Limits.queue,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=1, help="maximum number of tokens of an answer")
    ] = Limits.answer,
    body_kb: Annotated[int, typer.Option("--body-kb", min=1, help="maximum size of a request, KiB")] = Limits.body
    >> 10,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="maximum time for an answer, in seconds")
    ] = Limits.seconds,
    prefix_mb: Annotated[
        int, typer.Option("--prefix-mb", min=0, help="memory for cached prompt states, MiB; 0: no caching")
    ] = Limits.prefixes >> 20,
    ema: EMA = False,
) -> None:
    """Serve a trained model: the OpenAI API for other programs, and a web page to chat with it."""
    with reported():
        # Busy-waiting OpenMP threads would take cores from those that answer clients. Must be set before torch is
        # imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from hybridlm.errors import UserError
        from hybridlm.runs.run_folder import find_run

        find_run(run)  # before importing torch, which takes seconds
        try:
            from hybridlm.serve.command import run_serve
        except ModuleNotFoundError as error:
            if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
                raise
            raise UserError(f"serve needs {error.name}: pip install 'hybridlm[serve]'") from None

        limits = Limits(
            context=context or 0,
            answer=tokens,
            batch=batch,
            queue=queue,
            body=body_kb << 10,
            seconds=seconds,
            prefixes=prefix_mb << 20,
        )
        run_serve(run, limits, host=host, port=port, keys=api_keys, origins=cors or (), ema=ema)

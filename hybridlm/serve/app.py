"""The application: OpenAI's endpoints, health, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from hybridlm.errors import UserError, printable
from hybridlm.generate.row import Step
from hybridlm.generate.sampling import Sampling
from hybridlm.serve.answers import END, Answers, Usage, event
from hybridlm.serve.desk import Desk, Order
from hybridlm.serve.prompts import Prompts
from hybridlm.serve.refusal import Refusal
from hybridlm.serve.requests import Body, ChatBody, CompletionBody

_TO_READ = 30.0  # seconds more that a client has for reading its stream


def build_app(desk: Desk, prompts: Prompts) -> FastAPI:
    """prompts: of the run that ``desk`` answers with."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        desk.open()
        try:
            yield
        finally:
            await asyncio.to_thread(desk.close)

    app = FastAPI(openapi_url=None, lifespan=running)
    page = files("hybridlm.serve").joinpath("page.html").read_text(encoding="utf-8")
    policy = {"Content-Security-Policy": content_policy(page)}

    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _refused)

    @app.get("/")
    def home() -> Response:
        return HTMLResponse(page, headers=policy)

    @app.get("/health")
    def health() -> dict[str, str]:
        if not desk.engine.alive:
            raise Refusal(503, "the engine has stopped; the server's log says why", "engine_stopped")
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(desk.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [prompts.card()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        prompts.refuse_other(name)
        return prompts.card()

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _answer(desk, prompts, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await _answer(desk, prompts, body, request)

    return app


def content_policy(page: str) -> str:
    """Only the page's own script and style run, known by their digests; it talks to its own server only."""

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found
        )

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, Refusal):
        return error.response()
    if isinstance(error, UserError):
        return Refusal(400, "; ".join(error.problems)).response()
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return Refusal(400, f"the body is not JSON (character {first['loc'][-1]})", "json_invalid").response()
        place = printable(".".join(map(str, first["loc"][1:4])))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown, or not supported by this server"
        return Refusal(400, f"{place}: {message}" if place else message, first["type"], place or None).response()
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, str(error.detail)).response()


async def _answer(desk: Desk, prompts: Prompts, body: Body, request: Request) -> Response:
    read = await asyncio.to_thread(prompts.read, body)  # tokenizing a long prompt takes a while
    if body.n * len(read) > desk.limits.choices:
        raise Refusal(400, f"at most {desk.limits.choices} answers per request", param="n")
    seed = secrets.randbits(62) if body.seed is None else body.seed
    asked: list[tuple[Sequence[int], Sampling, Sequence[int]]] = []
    for ids, marks in read:
        sampling = body.sampling(seed, prompts.ends(body), min(desk.limits.answer, desk.limits.context - len(ids)))
        asked += [(ids, replace(sampling, seed=seed + number), marks) for number in range(body.n)]
    order = desk.order(asked)
    answers = Answers(prompts.name, prompts.tokenizer, isinstance(body, ChatBody))
    usage = Usage(prompt=sum(len(ids) for ids, _ in read))
    if body.stream:
        return _Stream(desk, order, _events(order, answers, usage, body))
    return await _at_once(desk, order, answers, usage, body, request)


class _Stream(StreamingResponse):
    """Gives the order up when the client is gone, also before the first event, or does not read."""

    def __init__(self, desk: Desk, order: Order, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._desk, self._order = desk, order

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._desk.limits.seconds + _TO_READ):
                await super().__call__(scope, receive, send)
        finally:
            self._desk.finished(self._order)


async def _at_once(desk: Desk, order: Order, answers: Answers, usage: Usage, body: Body, request: Request) -> Response:
    """The whole answer; given up as soon as the client is gone."""

    async def collected() -> list[list[Step]]:
        steps: list[list[Step]] = [[] for _ in order.jobs]
        async for step in order.steps():
            steps[step.row].append(step)
        return steps

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.create_task(collected()), asyncio.create_task(left())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal(499, "the client disconnected")
        steps = answer.result()
    finally:
        answer.cancel()
        gone.cancel()
        desk.finished(order)
    _count(usage, order, body)
    return JSONResponse(answers.whole(steps, usage, body.top is not None))


async def _events(order: Order, answers: Answers, usage: Usage, body: Body) -> AsyncIterator[bytes]:
    """The events of a stream."""
    try:
        for first in answers.first(len(order.jobs)):
            yield first
        async for step in order.steps():
            piece = answers.piece(step, body.top is not None)
            if piece is not None:
                yield piece
        if body.stream_options.include_usage:
            _count(usage, order, body)
            yield answers.usage(usage)
        yield END
    except Refusal as refusal:
        yield event(refusal.content())


def _count(usage: Usage, order: Order, body: Body) -> None:
    usage.new = order.written
    usage.reused = sum(job.reused for job in order.jobs[:: body.n])

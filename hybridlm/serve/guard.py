"""What every request passes before it is looked at: who asks, and how much is sent."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybridlm.serve.limits import Limits
from hybridlm.serve.metrics import Metrics
from hybridlm.serve.refusal import Refusal

_OPEN = ("/health", "/metrics")  # while the server drains
_LOCKED = ("/v1/", "/metrics")
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware. Bodies are read here, up to the limit, so that the application gets them whole; at most that
    much of a request is ever in memory. ``draining``: new requests are refused."""

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Iterable[str], hosts: Iterable[str], metrics: Metrics
    ) -> None:
        """keys: one of which ``/v1`` and ``/metrics`` ask for; none: everyone may. hosts: by which the server may be
        called, so that no web page reaches it by a name of its own; none: any."""
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts = frozenset(hosts)
        self.draining = False
        self.open = 0  # requests being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        self.open += 1
        try:
            self._admit(scope)
            await self._app(scope, await self._whole(scope, receive), sending)
        except Refusal as refusal:
            await refusal.response()(scope, receive, sending)
        except TimeoutError:  # of a client that does not read its stream: the connection is closed
            pass
        finally:
            self.open -= 1
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status or 499).inc()

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.draining and scope["path"] not in _OPEN:
            raise Refusal(503, "the server is shutting down", "shutting_down")
        host = headers.get(b"host", b"").decode("latin-1").rpartition("]")
        name = (host[0] + host[1] or host[2].partition(":")[0]).lower()
        if self._hosts and name not in self._hosts:
            raise Refusal(
                403,
                "unrecognized Host header; this server only accepts requests from its own machine (see --host)",
                "unknown_host",
            )
        if self._keys and scope["path"].startswith(_LOCKED):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = _digest(key.strip())
            # Every key is compared, whichever fits.
            fits = [hmac.compare_digest(given, known) for known in self._keys]
            if scheme.lower() != b"bearer" or not any(fits):
                raise Refusal(401, "a valid API key is required: Authorization: Bearer KEY", "invalid_api_key")

    async def _whole(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the body; what gives it to the application, and later tells that the client is gone."""
        limit, headers = self._limits.body, dict(scope["headers"])
        refusal = Refusal(413, f"the request is larger than {limit:,} bytes", "request_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > limit:
            raise refusal
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._limits.slow):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Refusal(400, "the request ended before its body did")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise refusal
        except TimeoutError:
            late = f"the request body took longer than {self._limits.slow:g} seconds to arrive"
            raise Refusal(408, late, "slow_request") from None
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def given() -> Message:
            return whole.pop() if whole else await receive()

        return given


def _digest(key: bytes) -> bytes:
    """Of equal length for every key, so that comparing two takes equally long."""
    return hashlib.sha256(key).digest()

"""uvicorn, which finishes open answers when it is told to end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from hybridlm.errors import UserError
from hybridlm.serve.guard import Guard

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LINGER = 0.5  # seconds that new requests are still refused in words after the last answer


class Server(uvicorn.Server):
    """On SIGTERM or Ctrl-C new requests get 503 while open ones are answered; then it ends. On a second Ctrl-C it ends
    at once."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=5
        )
        super().__init__(config)
        self._guard = guard
        self._idle = 0.0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's own, which no longer listens once a signal has come, and raises it again."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._guard.draining and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        self._guard.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._guard.draining:
            now = asyncio.get_running_loop().time()
            if self._guard.open or not self._idle:
                self._idle = now
            self.should_exit |= now - self._idle >= _LINGER
        return await super().on_tick(counter)


def listening(host: str, port: int) -> socket.socket:
    """A socket for the server. UserError: the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from None

"""Errors in the form of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

_SHOWN = 500  # characters of a message
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request is not answered. param: the field that is wrong; code: a word that a program can look for."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message[:_SHOWN], code, param

    def content(self) -> dict[str, Mapping[str, str | None]]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
        return JSONResponse(self.content(), self.status, headers.get(self.status))

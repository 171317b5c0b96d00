"""Errors as a client sees them: a status and a body in OpenAI's schema, and nothing that is not meant for it."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import (
    BadInput,
    DeadlineExceeded,
    ImageTooLarge,
    Overloaded,
    PromptTooLong,
    RateLimited,
    RequestTooLarge,
    SlowClient,
    StockadeError,
    TooLong,
    Unauthorized,
    Unavailable,
    UnknownModel,
)
from .protocol import ErrorBody, ErrorDetail

MAX_RETRY = 60  # seconds that a client is told to wait at most
_STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (Unauthorized, 401, "authentication_error"),
    (UnknownModel, 404, "invalid_request_error"),
    (RateLimited, 429, "rate_limit_error"),
    (Overloaded, 429, "overloaded_error"),
    (RequestTooLarge, 413, "invalid_request_error"),
    (ImageTooLarge, 413, "invalid_request_error"),
    (SlowClient, 408, "invalid_request_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (BadInput, 400, "invalid_request_error"),
    (TooLong, 400, "invalid_request_error"),
    (Unavailable, 503, "server_error"),
)
_CODES: dict[type[Exception], str] = {
    Unauthorized: "invalid_api_key",
    UnknownModel: "model_not_found",
    PromptTooLong: "context_length_exceeded",
}


class Failure(NamedTuple):
    status: int
    body: ErrorBody
    retry_after: int | None = None
    allow: str | None = None

    @property
    def code(self) -> str:
        return self.body.error.code or "error"

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the body is not read
            headers["Connection"] = "close"
        return JSONResponse(self.body.model_dump(), self.status, headers)


def failure(error: Exception) -> Failure:
    """What a client is told. Errors that are not the engine's own say nothing of themselves."""
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        found = _failure(error.status_code, str(error.detail), kind, f"http_{error.status_code}")
        return found._replace(allow=(error.headers or {}).get("Allow"))
    for known, status, kind in _STATUSES:
        if isinstance(error, known):
            code = _CODES.get(type(error)) or re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
            message = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
            found = _failure(status, message, kind, code)
            if isinstance(error, Overloaded):
                return found._replace(retry_after=min(MAX_RETRY, max(1, math.ceil(error.retry_after))))
            return found._replace(retry_after=1) if status == 503 else found
    if isinstance(error, StockadeError):
        return _failure(500, "the request could not be answered", "server_error", "pass_failed")
    return _failure(500, "an error of the server", "server_error", "internal_error")


def _invalid(error: RequestValidationError) -> Failure:
    """The first thing that is wrong with a body, and where; what was sent is not repeated."""
    first = error.errors()[0]
    place = [str(part)[:64] for part in first.get("loc", ()) if part != "body"]
    message = str(first.get("msg", "invalid"))[:500]
    if first.get("type") == "json_invalid":
        return _failure(400, "the body is no valid JSON", "invalid_request_error", "invalid_json")
    param = ".".join(place) or None
    where = f"{param}: " if param else ""
    return _failure(400, where + message, "invalid_request_error", "invalid_value", param)


def _failure(status: int, message: str, kind: str, code: str, param: str | None = None) -> Failure:
    message = message.encode("utf-8", "replace").decode()  # a lone surrogate, sent as an escape, has no UTF-8
    param = None if param is None else param.encode("utf-8", "replace").decode()
    return Failure(status, ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code)))

"""Errors as OpenAI's clients see them: one JSON shape, one mapping. Above: every edge; below: `hostler.errors`.

Nothing here ever carries a path, an address, a prompt, a key or the text of an unexpected exception.
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

import grpc
from hostler.errors import HostlerError, Internal, InvalidRequest
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RouteNotFound(HostlerError):
    """No such path."""

    code, reason, http_status = grpc.StatusCode.NOT_FOUND, "not_found", 404


class MethodNotAllowed(HostlerError):
    """The path exists, but not with this method."""

    code, reason, http_status = grpc.StatusCode.INVALID_ARGUMENT, "method_not_allowed", 405


class RequestTimeout(HostlerError):
    """The body stopped arriving."""

    code, reason, http_status = grpc.StatusCode.DEADLINE_EXCEEDED, "request_timeout", 408


class RateLimited(HostlerError):
    """An API key has used up what it may.

    Args:
        message: one sentence for the caller.
        retry_after_s: when there will be room again, in seconds.
        headers: that tell of the limits.
    """

    code, reason, http_status = grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_exceeded", 429

    def __init__(self, message: str, retry_after_s: float, headers: dict[str, str] | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.headers = headers or {}


class ClientGone(Exception):
    """The client closed its connection: nobody is left to answer. Never sent anywhere."""


def error_type(http_status: int) -> str:
    """Return OpenAI's `type` for an HTTP status."""
    if http_status >= 500:
        return "server_error"
    return _TYPES.get(http_status, "invalid_request_error")


def error_body(error: HostlerError) -> dict[str, Any]:
    """Return the JSON object that every dialect of OpenAI's answers with; all four keys are always there."""
    return {
        "error": {
            "message": error.message,
            "type": error_type(error.http_status),
            "param": error.param,
            "code": error.reason,
        }
    }


def error_headers(error: HostlerError) -> dict[str, str]:
    """Return the headers that go with an error: `Retry-After` where trying again makes sense."""
    if error.retry_after_s is None:
        return {}
    told = error.headers if isinstance(error, RateLimited) else {}
    return told | {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}


def as_hostler_error(error: BaseException, *, request_id: str) -> HostlerError:
    """Give any exception its place in the tree; what is unknown is logged here, once, and becomes a 500."""
    if isinstance(error, HostlerError):
        return error
    if isinstance(error, HTTPException):
        return _from_http_exception(error)
    log.error("unexpected exception", exc_info=error, extra={"request_id": request_id})
    return Internal("The server had an internal error. Its log has the details under this request's id.")


def _from_http_exception(error: HTTPException) -> HostlerError:
    if error.status_code == 404:
        return RouteNotFound("Unknown path. The API lives under /v1, for example /v1/chat/completions.")
    if error.status_code == 405:
        return MethodNotAllowed("This path does not take this method.")
    phrase = HTTPStatus(error.status_code).phrase
    return InvalidRequest(f"{phrase}.") if error.status_code < 500 else Internal(f"{phrase}.")

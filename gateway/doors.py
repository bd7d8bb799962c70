"""The middlewares that every request passes, as plain ASGI. Above: the server; below: CORS and the routes.

`Envelope` (outermost): request id, path rewriting, one log line.
`Gate` (inside CORS, so that whatever it says can be read by the pages of allowed origins): Host allow-list, OPTIONS and
HEAD, API key, the last word on errors.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from hostler.errors import InvalidApiKey, PermissionDenied
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.auth import Hosts, PageCheck
from gateway.error_reply import error_response, speaks_anthropic
from gateway.errors import ClientGone, as_hostler_error
from gateway.keys.caller import Caller, set_caller
from gateway.keys.limits import KeyLimits
from gateway.keys.ring import KeyRing
from gateway.metrics import Meter

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
ANTHROPIC_ID_HEADER = "request-id"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PREFIX = "/v1"
_OPEN_PATH = "/health"
_ALLOW = {"Allow": "DELETE, GET, HEAD, OPTIONS, POST"}


def request_id_of(scope: Scope) -> str:
    """Return the id that `Envelope` gave the request."""
    value: str = scope.get("state", {}).get("request_id", "")
    return value


def cache_scope_of(scope: Scope) -> str:
    """Return the cache scope that `Gate` gave the caller; it goes with every generation.

    Raises:
        KeyError: the request did not pass `Gate`, or came in without the key that others need.
    """
    return caller_of(scope).cache_scope


def caller_of(scope: Scope) -> Caller:
    """Return whose request it is, as `Gate` has found.

    Raises:
        KeyError: the request did not pass `Gate`, or came in without the key that others need.
    """
    value: Caller = scope["state"]["caller"]
    return value


def is_administration(path: str) -> bool:
    """Return whether a canonical path is for those who administer, and so not for a key that may only infer."""
    return path == "/metrics" or path == "/admin" or path.startswith("/admin/")


def choose_request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """Return the client's request id if it is harmless, else a new one.

    It names the request in replies and logs. Two requests may carry the same one: nothing is ever looked up by it.
    """
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return f"req_{uuid.uuid4().hex}"


def canonical_path(path: str) -> str:
    """Return the path as routes know it: without /v1, without trailing or doubled leading slashes."""
    path = "/" + path.strip("/")
    if path == _PREFIX:
        return "/"
    return path[len(_PREFIX) :] if path.startswith(_PREFIX + "/") else path


class Envelope:
    """Gives every request an id and a canonical path, and every reply its id and a line in the log."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self._app = app
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; no exception leaves."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = choose_request_id(scope["headers"])
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": request_id}}
        scope["path"] = canonical_path(scope["path"])
        scope["raw_path"] = scope["path"].encode("utf-8", errors="replace")
        born = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                if speaks_anthropic(scope):
                    headers[ANTHROPIC_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            status = status or 499
        except Exception as exception:
            error = as_hostler_error(exception, request_id=request_id)
            if not status:
                await error_response(error, scope)(scope, receive, send_with_id)
        finally:
            self._meter.reply(scope["method"], status)
            log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                    "duration_ms": round((time.monotonic() - born) * 1000, 1),
                },
            )


class Gate:
    """Checks the Host, answers OPTIONS and HEAD, demands the key of everything else, before any of the body is read.

    Whoever comes in is known from here on (`caller_of`). A key that may not infer, or has used up what it may, is
    turned away here; `admin_door` asks whether it may administer.
    """

    def __init__(
        self,
        app: ASGIApp,
        host_check: Hosts,
        ring: KeyRing,
        limits: KeyLimits,
        page_check: PageCheck | None = None,
        demands: bool | None = None,
    ) -> None:
        self._app = app
        self._host_check = host_check
        self._ring = ring
        self._limits = limits
        self._page_check = page_check
        self._demands = demands

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, or refuse, one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._serve(scope, receive, noting_send)
        except ClientGone:
            raise
        except Exception as exception:
            if is_begun:
                raise
            error = as_hostler_error(exception, request_id=request_id_of(scope))
            await error_response(error, scope)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._host_check.allows(scope["headers"]):
            raise PermissionDenied(
                "The Host header does not name this server. Use localhost, or allow the name with 'allowed_hosts'."
            )
        if scope["method"] == "OPTIONS":
            await Response(status_code=204, headers=_ALLOW)(scope, receive, send)
        elif scope["method"] == "HEAD":
            await Response(status_code=200, headers=_ALLOW)(scope, receive, send)
        elif self._page_check is not None and not self._page_check.allows(scope["method"], scope["headers"]):
            raise PermissionDenied(
                "Pages of other sites may not use a server that demands no API key. Allow their origin with 'cors'."
            )
        elif (caller := self._ring.caller(scope["headers"], demands=self._demands)) is not None:
            await self._serve_caller(caller, scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] == _OPEN_PATH:
            await self._app(scope, receive, send)
        else:
            raise InvalidApiKey("Missing or wrong API key. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")

    async def _serve_caller(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        set_caller(caller)
        scope = {**scope, "state": {**scope.get("state", {}), "caller": caller}}
        infers = scope["method"] == "POST" and not is_administration(scope["path"])
        if infers and "infer" not in caller.scopes:
            raise PermissionDenied("This API key may not use models: it lacks the scope 'infer'.")
        key = caller.key
        if not infers or key is None:
            await self._app(scope, receive, send)
            return
        if (key.requests_per_minute, key.tokens_per_minute, key.max_streams) == (None, None, None):
            await self._app(scope, receive, send)
            return
        told = self._limits.enter(key)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in told.items():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            self._limits.leave(key)

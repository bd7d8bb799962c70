"""The whole HTTP reply for an error before the first byte, in the caller's dialect. Above: `doors`, `app`.

Below: the dialects' error shapes. The dialect is told by path and header, so that those are answered in their own words
whom a door turns away before any route has seen them.
"""

from __future__ import annotations

import orjson
from hostler.errors import HostlerError
from starlette.responses import Response
from starlette.types import Scope

from gateway.dialects.anthropic_messages import errors as anthropic
from gateway.errors import error_body, error_headers

_MESSAGES = "/messages"


def speaks_anthropic(scope: Scope) -> bool:
    """Return whether a request is in Anthropic's dialect: by its (canonical) path, or by the header of its clients."""
    path: str = scope["path"]
    if path == _MESSAGES or path.startswith(f"{_MESSAGES}/"):
        return True
    return any(name == b"anthropic-version" for name, _ in scope["headers"])


def error_response(error: HostlerError, scope: Scope) -> Response:
    """Return the reply that tells the caller of an error."""
    if speaks_anthropic(scope):
        body = anthropic.error_body(error, scope.get("state", {}).get("request_id", ""))
    else:
        body = error_body(error)
    return Response(
        orjson.dumps(body),
        status_code=error.http_status,
        headers=error_headers(error),
        media_type="application/json",
    )

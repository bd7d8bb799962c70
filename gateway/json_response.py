"""JSON replies, written by orjson. Above: routes."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response


def json_response(value: Mapping[str, object], *, status_code: int = 200) -> Response:
    """Return a reply with `value` as its body."""
    return Response(orjson.dumps(value), status_code=status_code, media_type="application/json")

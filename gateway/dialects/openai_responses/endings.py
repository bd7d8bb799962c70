"""How a background response ends from outside: cancelled, or failed with its process. Above: routes, `background`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hostler.errors import HostlerError, Unavailable

from gateway.dialects.openai_responses.response_object import error_object
from gateway.sse import event_frame

Ending = Callable[[dict[str, Any], int], tuple[dict[str, Any], bytes]]
"""From an object and the next sequence number to the ended object and the frame that tells it."""

LOST = Unavailable("The process that worked on this response went away before it was finished. Ask again.")


def cancelled(response: dict[str, Any], number: int) -> tuple[dict[str, Any], bytes]:
    """End a response because a client asked for it.

    There is no event of that name; `response.incomplete` ends a stream without calling it an error.
    """
    return _ended({**response, "status": "cancelled"}, number, "response.incomplete")


def failed(error: HostlerError) -> Ending:
    """Return how to end a response with an error."""

    def end(response: dict[str, Any], number: int) -> tuple[dict[str, Any], bytes]:
        ended = {**response, "status": "failed", "error": error_object(error)}
        return _ended(ended, number, "response.failed")

    return end


def _ended(response: dict[str, Any], number: int, kind: str) -> tuple[dict[str, Any], bytes]:
    return response, event_frame({"type": kind, "sequence_number": number, "response": response})

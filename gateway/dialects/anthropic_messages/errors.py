"""Errors in Anthropic's shape. Above: `error_reply`, `routes.messages`; below: `hostler.errors`."""

from __future__ import annotations

from typing import Any

from hostler.errors import ContextLengthExceeded, HostlerError

# The contract's names of fields → what they are called here.
_PARAMS = {"response_format": "output_config.format", "stop": "stop_sequences", "reasoning_effort": "output_config"}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    # Clients try again after this one, in a stream too, where there is no status to go by.
    503: "overloaded_error",
}


def error_type(http_status: int) -> str:
    """Return Anthropic's `type` for an HTTP status."""
    return _TYPES.get(http_status, "invalid_request_error" if http_status < 500 else "api_error")


def error_body(error: HostlerError, request_id: str) -> dict[str, Any]:
    """Return the JSON object of an error; as an event of a stream, too.

    There is no field for the name of the parameter at fault, so the message begins with it unless it is in there.
    """
    message = error.message
    if error.param is not None and error.param not in message:
        message = f"{_param_here(error.param)}: {message}"
    if isinstance(error, ContextLengthExceeded):
        # These are the words by which clients know that a conversation must be shortened, and by how much.
        counts = f"{error.num_tokens} tokens > {error.max_tokens} maximum" if error.num_tokens else error.message
        message = f"prompt is too long: {counts}"
    return {
        "type": "error",
        "error": {"type": error_type(error.http_status), "message": message},
        "request_id": request_id,
    }


def _param_here(param: str) -> str:
    head, bracket, rest = param.partition("[")
    return (_PARAMS.get(head, head) + bracket + rest).replace("[", ".").replace("]", "")

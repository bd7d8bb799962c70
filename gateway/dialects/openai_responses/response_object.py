"""The response object, its usage and its errors. Above: `builder`, the store; below: chat's logprobs.

All keys are always there: Open Responses demands 31 of them, OpenAI's own clients a few more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hostler.errors import HostlerError
from hostler.inference.v1 import inference_pb2 as pb

# The contract's and chat's names of fields → what they are called here.
_PARAMS = {
    "messages": "input",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}


def new_response(
    *, response_id: str, created_unix_s: int, model: str, status: str, store: bool, echo: dict[str, Any]
) -> dict[str, Any]:
    """Return a response that has no output yet.

    Args:
        status: "in_progress" or "queued".
        echo: fields that repeat the request (`ResponsesRequest.echo`).
    """
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_unix_s,
        "completed_at": None,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        "store": store,
        **echo,
    }


def usage_sum(usages: Iterable[pb.Usage]) -> pb.Usage:
    """Return the token counts of several generations together."""
    total = pb.Usage()
    for usage in usages:
        total.num_prompt_tokens += usage.num_prompt_tokens
        total.num_cached_tokens += usage.num_cached_tokens
        total.num_completion_tokens += usage.num_completion_tokens
        total.num_reasoning_tokens += usage.num_reasoning_tokens
    return total


def usage_object(usage: pb.Usage) -> dict[str, Any]:
    """Return the token counts of a response."""
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }


def error_object(error: HostlerError) -> dict[str, Any]:
    """Return the `error` of a failed response. `code` is one of the words that clients' types know; ours is `type`."""
    if error.http_status == 429:
        code = "rate_limit_exceeded"
    else:
        code = "invalid_prompt" if error.http_status < 500 else "server_error"
    return {"code": code, "message": error.message, "param": param_here(error.param), "type": error.reason}


def param_here(param: str | None) -> str | None:
    """Return the name that a field of the contract has in this dialect; other names as they are."""
    if param is None:
        return None
    head, bracket, rest = param.partition("[")
    return _PARAMS.get(head, head) + bracket + rest


def in_this_dialect(error: HostlerError) -> HostlerError:
    """Return an error whose `param` a client of this dialect understands."""
    param = param_here(error.param)
    if param == error.param:
        return error
    return type(error)(error.message, param=param, retry_after_s=error.retry_after_s)

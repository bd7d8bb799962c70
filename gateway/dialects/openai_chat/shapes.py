"""Pieces that a streamed chunk and a whole reply share: usage, logprobs, finish reasons. Above: `stream`, `reply`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hostler
from hostler.inference.v1 import inference_pb2 as pb

SYSTEM_FINGERPRINT = f"fp_hostler_{hostler.__version__.replace('.', '_')}"
# OpenAI's own stand-in for "so unlikely that it has no number"; JSON has no infinity.
_FLOOR_LOGPROB = -9999.0

_FINISH_REASONS = {
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
    pb.FINISH_REASON_CONTENT_FILTER: "content_filter",
}


def finish_reason(finish: pb.Finish, *, called_tools: bool) -> str:
    """Return OpenAI's word; a reply that called tools and ended by itself says `tool_calls`."""
    reason = _FINISH_REASONS.get(finish.reason, "stop")
    return "tool_calls" if reason == "stop" and called_tools else reason


def usage_object(usages: Iterable[pb.Usage]) -> dict[str, Any]:
    """Return the usage of all choices together: they share one prompt, counted once.

    Of it was cached before what was so for every choice: the first one's work serves the others.
    """
    usages = list(usages)
    cached = min((usage.num_cached_tokens for usage in usages), default=0)
    prompt = completion = reasoning = 0
    for usage in usages:
        prompt = max(prompt, usage.num_prompt_tokens)
        completion += usage.num_completion_tokens
        reasoning += usage.num_reasoning_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def logprob_items(logprobs: Iterable[pb.TokenLogprob]) -> list[dict[str, Any]]:
    """Return `logprobs.content`: a token that is not whole UTF-8 shows the replacement character, and its bytes."""
    return [{**_token(item), "top_logprobs": [_token(top) for top in item.top]} for item in logprobs]


def _token(item: pb.TokenLogprob) -> dict[str, Any]:
    return {
        "token": item.token.decode("utf-8", errors="replace"),
        "logprob": max(item.logprob, _FLOOR_LOGPROB) if item.logprob == item.logprob else _FLOOR_LOGPROB,
        "bytes": list(item.token),
    }

"""Schemas of what comes back. Each lists the keys that are always there; more may come. Above: `schemas`."""

from __future__ import annotations

from gateway.openapi.shapes import (
    Schema,
    any_of,
    array,
    boolean,
    integer,
    map_of,
    maybe,
    number,
    obj,
    one_of,
    ref,
    string,
)

_COUNT = integer(0)
_MAYBE_COUNT = maybe(_COUNT)
_NAME = string(minLength=1)
_MAYBE_NAME = maybe(string())
_PARTS = array(obj({"device": _NAME, "num_bytes": _COUNT}))
_USAGE = obj(
    {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
    {
        "prompt_tokens_details": obj({"cached_tokens": _COUNT}),
        "completion_tokens_details": obj({"reasoning_tokens": _COUNT}),
    },
)
_CALL = obj({"id": _NAME, "type": one_of("function"), "function": obj({"name": _NAME, "arguments": string()})})
_LEGACY_LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
_FINISH = one_of("stop", "length", "tool_calls", "content_filter")
_HEAD = {"id": _NAME, "created": _COUNT, "model": _NAME}

REPLIES: dict[str, Schema] = {
    "Error": obj(
        {
            "error": obj(
                {
                    "message": _NAME,
                    "type": one_of(
                        "invalid_request_error",
                        "authentication_error",
                        "permission_error",
                        "not_found_error",
                        "rate_limit_error",
                        "server_error",
                    ),
                    "param": _MAYBE_NAME,
                    "code": _NAME,
                }
            )
        },
        text="Every error before the first byte of a reply. In a stream the same object is the last event.",
    ),
    "ChatCompletion": obj(
        {
            **_HEAD,
            "object": one_of("chat.completion"),
            "choices": array(
                obj(
                    {
                        "index": _COUNT,
                        "message": obj(
                            {"role": one_of("assistant"), "content": _MAYBE_NAME, "refusal": _MAYBE_NAME},
                            {"reasoning_content": string(), "tool_calls": array(_CALL, 1)},
                        ),
                        "logprobs": maybe(obj({"content": array(ref("TokenLogprob"))})),
                        "finish_reason": _FINISH,
                    }
                ),
                1,
            ),
            "usage": _USAGE,
            "system_fingerprint": _NAME,
        }
    ),
    "TokenLogprob": obj({"token": string(), "logprob": number(high=0), "bytes": array(integer(0, 255))}),
    "Completion": obj(
        {
            **_HEAD,
            "object": one_of("text_completion"),
            "choices": array(
                obj(
                    {
                        "index": _COUNT,
                        "text": string(),
                        "logprobs": maybe(
                            obj(
                                {
                                    n: {"type": "array"}
                                    for n in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                                }
                            )
                        ),
                        "finish_reason": one_of("stop", "length"),
                    }
                ),
                1,
            ),
            "usage": _USAGE,
        }
    ),
    "Response": obj(
        {
            "id": _NAME,
            "object": one_of("response"),
            "created_at": number(0),
            "status": one_of("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
            "model": _NAME,
            "output": array(ref("Item")),
            "error": maybe(obj({"code": _NAME, "message": string()})),
            "incomplete_details": maybe(obj({"reason": _NAME})),
            "instructions": maybe(any_of(string(), array(ref("Item")))),
            "parallel_tool_calls": boolean(),
            "previous_response_id": _MAYBE_NAME,
            "tool_choice": any_of(string(), {"type": "object"}),
            "tools": array({"type": "object"}),
            "usage": maybe(
                obj(
                    {
                        "input_tokens": _COUNT,
                        "input_tokens_details": obj({"cached_tokens": _COUNT}),
                        "output_tokens": _COUNT,
                        "output_tokens_details": obj({"reasoning_tokens": _COUNT}),
                        "total_tokens": _COUNT,
                    }
                )
            ),
            "metadata": maybe(map_of(string())),
            "background": boolean(),
            "store": boolean(),
        }
    ),
    "Item": obj({"type": _NAME}, text="One item of a conversation: a message, a call, its output, reasoning."),
    "ItemList": obj(
        {
            "object": one_of("list"),
            "data": array(ref("Item")),
            "first_id": string(),
            "last_id": string(),
            "has_more": boolean(),
        }
    ),
    "DeletedResponse": obj({"id": _NAME, "object": one_of("response"), "deleted": one_of(True)}),
    "TokenCount": obj({"object": one_of("response.input_tokens"), "input_tokens": _COUNT}),
    "Conversation": obj(
        {"id": _NAME, "object": one_of("conversation"), "created_at": _COUNT, "metadata": map_of(string())}
    ),
    "DeletedConversation": obj({"id": _NAME, "object": one_of("conversation.deleted"), "deleted": one_of(True)}),
    "Message": obj(
        {
            "id": _NAME,
            "type": one_of("message"),
            "role": one_of("assistant"),
            "model": _NAME,
            "content": array(obj({"type": one_of("text", "thinking", "redacted_thinking", "tool_use")})),
            "stop_reason": one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"),
            "stop_sequence": _MAYBE_NAME,
            "usage": obj({"input_tokens": _COUNT, "output_tokens": _COUNT}),
        }
    ),
    "MessageTokens": obj({"input_tokens": _COUNT}),
    "AnthropicError": obj(
        {
            "type": one_of("error"),
            "error": obj({"type": _NAME, "message": _NAME}),
            "request_id": _NAME,
        }
    ),
    "Metrics": string(description="Prometheus' text format."),
    "Embeddings": obj(
        {
            "object": one_of("list"),
            "model": _NAME,
            "data": array(
                obj(
                    {
                        "object": one_of("embedding"),
                        "index": _COUNT,
                        "embedding": any_of(array(number()), string(description="little-endian float32, base64")),
                    }
                )
            ),
            "usage": obj({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "Ranking": obj(
        {
            "id": _NAME,
            "model": _NAME,
            "results": array(
                obj({"index": _COUNT, "relevance_score": number()}, {"document": obj({"text": string()})})
            ),
            "usage": obj({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "Sound": string(description="Audio in the format that was asked for, as it is made."),
    "Voices": obj({"object": one_of("list"), "voices": array(obj({"id": _NAME, "name": _NAME, "model": _NAME}))}),
    "Transcript": obj(
        {"text": string()},
        {
            "task": one_of("transcribe", "translate"),
            "language": string(),
            "duration": {"type": "number"},
            "words": array(obj({"word": string(), "start": {"type": "number"}, "end": {"type": "number"}})),
            "segments": array({"type": "object"}),
            "logprobs": array({"type": "object"}),
            "usage": obj({"type": one_of("duration"), "seconds": _COUNT}),
        },
    ),
    "AudioModels": obj({"object": one_of("list"), "data": array(ref("Model")), "models": array(ref("Model"))}),
    "McpServers": obj({"object": one_of("list"), "data": array({"type": "object"})}),
    "McpTried": obj(
        {
            "server": _NAME,
            "ok": boolean(),
            "took_ms": _COUNT,
            "error": _MAYBE_NAME,
            "tools": array(obj({"name": _NAME, "description": string(), "read_only": boolean()})),
            "notes": array(string()),
            "stderr": string(),
        }
    ),
    "Tokens": obj({"count": _COUNT, "max_model_len": _COUNT, "tokens": array(_COUNT)}),
    "Prompt": obj({"prompt": string()}),
    "Model": obj(
        {"id": _NAME, "object": one_of("model"), "created": _COUNT, "owned_by": _NAME},
        {"max_model_len": integer(1), "parent": _NAME, "task": _NAME, "name": _NAME},
    ),
    "ModelList": obj({"object": one_of("list"), "data": array(ref("Model"))}),
    "Health": obj({"status": one_of("ok")}),
    "Readiness": obj({"status": one_of("ready", "not_ready"), "models": map_of(boolean())}),
    "Status": obj(
        {
            "version": _NAME,
            "started_unix_ms": _COUNT,
            "devices": array(obj({"id": _NAME, "kind": _NAME, "budget_bytes": _COUNT})),
            "models": array(obj({"name": _NAME, "state": _NAME, "engine": _MAYBE_NAME})),
            "replicas": array(
                obj({"model": _NAME, "id": string(), "state": _NAME, "parts": _PARTS, "reason": string()})
            ),
            "nodes": array(obj({"id": _MAYBE_NAME, "num_blank_workers": _COUNT})),
        }
    ),
    "Plan": obj(
        {
            "model": _NAME,
            "feasible": boolean(),
            "parts": _PARTS,
            "needed_bytes": _COUNT,
            "shrink_models": array(_NAME),
            "sleep_models": array(_NAME),
            "evict_models": array(_NAME),
            "expected_ms": _MAYBE_COUNT,
            "reason": string(),
            "lacking_bytes": _MAYBE_COUNT,
            "advice": array(string()),
        }
    ),
    "Loaded": obj(
        {
            "status": one_of("ready"),
            "model": _NAME,
            "replica": _NAME,
            "generation": _COUNT,
            "cached": boolean(),
            "took_ms": _COUNT,
        }
    ),
    "Unloaded": obj({"model": _NAME, "num_unloaded": _COUNT}),
    "Asleep": obj({"model": _NAME, "num_asleep": _COUNT}),
    "Pinned": obj({"model": _NAME, "pinned": boolean()}),
    "Events": obj(
        {
            "object": one_of("list"),
            "data": array(obj({"number": _COUNT, "unix_ms": _COUNT, "kind": _NAME, "why": string()})),
        }
    ),
    "OpenApi": obj({"openapi": _NAME, "info": {"type": "object"}, "paths": {"type": "object"}}),
}

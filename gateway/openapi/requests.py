"""Schemas of request bodies. What they leave out is ignored or refused by name; see each dialect. Above: `schemas`."""

from __future__ import annotations

from gateway.dialects.openai_chat.messages import MAX_MESSAGES
from gateway.dialects.openai_chat.request import MAX_CHOICES, MAX_MCP_SERVERS, MAX_TOP_LOGPROBS
from gateway.dialects.openai_chat.tools import MAX_TOOLS
from gateway.dialects.sampling import MAX_LOGIT_BIAS, MAX_STOP_CHARS, MAX_STOPS
from gateway.fields import MAX_MODEL_CHARS
from gateway.openapi.shapes import (
    Schema,
    any_of,
    array,
    boolean,
    integer,
    map_of,
    number,
    obj,
    one_of,
    ref,
    string,
)

_INT32 = 2**31 - 1
_MODEL = ref("ModelName")
_SAMPLING: dict[str, Schema] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(-1, _INT32),
    "min_p": number(0, 1),
    "seed": integer(-(2**63), 2**64 - 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 10),
    "logit_bias": {
        **map_of(number(-100, 100)),
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "maxProperties": MAX_LOGIT_BIAS,
    },
    "stop": any_of(string(maxLength=MAX_STOP_CHARS), array(string(maxLength=MAX_STOP_CHARS), high=MAX_STOPS)),
    "keep_alive": any_of(number(-1, 10**8), string(pattern="^[0-9]{1,6}(ms|s|m|h)$")),
    "service_tier": one_of("auto", "default", "flex", "priority"),
}
_STREAM: dict[str, Schema] = {"stream": boolean(), "stream_options": obj({}, {"include_usage": boolean()})}
_OBJECT: Schema = {"type": "object"}
_FORMAT = any_of(
    obj({"type": one_of("text", "json_object")}),
    obj(
        {"type": one_of("json_schema"), "json_schema": obj({"name": string(minLength=1), "schema": {"type": "object"}})}
    ),
)

_TEXT_PART = obj({"type": one_of("text"), "text": string()})
_IMAGE_PART = obj({"type": one_of("image_url"), "image_url": obj({"url": string(pattern="^(data:image/|https?://)")})})
_CONTENT = any_of(string(), array(any_of(_TEXT_PART, _IMAGE_PART), low=1))
_FUNCTION_NAME = string(pattern="^[A-Za-z0-9_.-]{1,64}$")
_FUNCTION_DETAILS: dict[str, Schema] = {"description": string(), "parameters": _OBJECT, "strict": boolean()}
_FUNCTION = obj({"name": _FUNCTION_NAME}, _FUNCTION_DETAILS)
_CALLED = obj(
    {
        "id": string(maxLength=256),
        "type": one_of("function"),
        "function": obj({"name": _FUNCTION_NAME, "arguments": string()}),
    }
)
_MESSAGE = any_of(
    obj({"role": one_of("system", "developer", "user"), "content": _CONTENT}, {"name": string(maxLength=256)}),
    obj({"role": one_of("assistant")}, {"content": any_of(string()), "tool_calls": array(_CALLED)}),
    obj({"role": one_of("tool"), "tool_call_id": string(maxLength=256), "content": _CONTENT}),
)

_INPUT_TEXT = obj({"type": one_of("input_text"), "text": string()})
_CALL_ID = string(minLength=1, maxLength=64)
_TURN = {"role": one_of("system", "developer", "user", "assistant"), "content": any_of(string(), array(_INPUT_TEXT, 1))}
_CALL_ITEM = {"type": one_of("function_call"), "call_id": _CALL_ID, "name": _FUNCTION_NAME, "arguments": string()}
_OUTPUT_ITEM = {"type": one_of("function_call_output"), "call_id": _CALL_ID, "output": string()}
_ITEM = any_of(obj(_TURN), obj(_CALL_ITEM), obj(_OUTPUT_ITEM))
_FLAT_TOOL = obj({"type": one_of("function"), "name": _FUNCTION_NAME}, _FUNCTION_DETAILS)
_TOOL_NAMES = array(string(), high=512)
_TOOL_FILTER = obj({}, {"tool_names": _TOOL_NAMES, "read_only": boolean()})
_MCP_TOOL = obj(
    {"type": one_of("mcp"), "server_label": string(pattern="^[A-Za-z0-9_.-]{1,64}$")},
    {
        "server_url": string(maxLength=4096),
        "authorization": string(),
        "allowed_tools": any_of(_TOOL_NAMES, _TOOL_FILTER),
        "require_approval": any_of(one_of("always", "never"), obj({}, {"always": _TOOL_FILTER, "never": _TOOL_FILTER})),
    },
)
_METADATA = {
    **map_of(string(maxLength=512)),
    "propertyNames": {"minLength": 1, "maxLength": 64},
    "maxProperties": 16,
}
_TEXTS = any_of(string(minLength=1), array(string(minLength=1), 1, 2048), array(integer(0, _INT32), 1, 8192))

_ANTHROPIC_TEXT = obj({"type": one_of("text"), "text": string(minLength=1)})
_TOOL_USE = obj({"type": one_of("tool_use"), "id": _CALL_ID, "name": _FUNCTION_NAME, "input": _OBJECT})
_TOOL_RESULT = obj({"type": one_of("tool_result"), "tool_use_id": _CALL_ID}, {"content": any_of(string())})
_COUNTED: dict[str, Schema] = {
    "model": _MODEL,
    "messages": array(ref("AnthropicMessage"), 1, MAX_MESSAGES),
}
_COUNTED_IF_GIVEN: dict[str, Schema] = {
    "system": any_of(string(), array(_ANTHROPIC_TEXT)),
    "tools": array(obj({"name": _FUNCTION_NAME, "input_schema": _OBJECT}, {"description": string()}), high=MAX_TOOLS),
    "tool_choice": any_of(
        obj({"type": one_of("auto", "any", "none")}), obj({"type": one_of("tool"), "name": _FUNCTION_NAME})
    ),
    "thinking": any_of(
        obj({"type": one_of("disabled", "adaptive")}),
        obj({"type": one_of("enabled"), "budget_tokens": integer(1, _INT32)}),
    ),
}

REQUESTS: dict[str, Schema] = {
    "AnthropicMessage": obj(
        {
            "role": one_of("user", "assistant", "system"),
            "content": any_of(string(minLength=1), array(any_of(_ANTHROPIC_TEXT, _TOOL_USE, _TOOL_RESULT), 1)),
        }
    ),
    "MessagesRequest": obj(
        {**_COUNTED, "max_tokens": integer(0, _INT32)},
        {
            **_COUNTED_IF_GIVEN,
            "stream": boolean(),
            "stop_sequences": array(string(minLength=1, maxLength=MAX_STOP_CHARS), high=MAX_STOPS),
            "temperature": number(0, 2),
            "top_p": number(0, 1),
            "top_k": integer(-1, _INT32),
            "output_config": obj({}, {"effort": one_of("low", "medium", "high")}),
            "metadata": _OBJECT,
        },
    ),
    "CountRequest": obj(_COUNTED, _COUNTED_IF_GIVEN),
    "ModelName": string(minLength=1, maxLength=MAX_MODEL_CHARS, description="A name or alias that /v1/models lists."),
    "ChatRequest": obj(
        {"model": _MODEL, "messages": array(ref("ChatMessage"), 1, MAX_MESSAGES)},
        {
            **_SAMPLING,
            **_STREAM,
            "n": integer(1, MAX_CHOICES),
            "max_completion_tokens": integer(1, _INT32),
            "max_tokens": integer(1, _INT32),
            "logprobs": boolean(),
            "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
            "tools": array(obj({"type": one_of("function"), "function": _FUNCTION}), high=MAX_TOOLS),
            "tool_choice": any_of(
                one_of("none", "auto", "required"),
                obj({"type": one_of("function"), "function": obj({"name": _FUNCTION_NAME})}),
            ),
            "parallel_tool_calls": boolean(),
            "mcp_servers": array(string(), high=MAX_MCP_SERVERS),
            "response_format": _FORMAT,
            "reasoning_effort": one_of("none", "minimal", "low", "medium", "high"),
            "chat_template_kwargs": _OBJECT,
        },
        "OpenAI's chat completion, with the extensions that other servers made usual.",
    ),
    "ChatMessage": _MESSAGE,
    "ResponsesRequest": obj(
        {"model": _MODEL},
        {
            **{k: v for k, v in _SAMPLING.items() if k != "stop"},
            "input": any_of(string(minLength=1), array(ref("InputItem"), 1)),
            "instructions": string(),
            "previous_response_id": string(maxLength=64),
            "conversation": any_of(string(maxLength=64), obj({"id": string(maxLength=64)})),
            "store": boolean(),
            "background": boolean(),
            "stream": boolean(),
            "max_output_tokens": integer(1, _INT32),
            "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
            "tools": array(any_of(_FLAT_TOOL, _MCP_TOOL), high=MAX_TOOLS),
            "max_tool_calls": integer(1, _INT32),
            "tool_choice": any_of(
                one_of("none", "auto", "required"), obj({"type": one_of("function"), "name": _FUNCTION_NAME})
            ),
            "parallel_tool_calls": boolean(),
            "truncation": one_of("auto", "disabled"),
            "text": obj({}, {"verbosity": one_of("low", "medium", "high")}),
            "reasoning": obj({}, {"effort": one_of("none", "minimal", "low", "medium", "high")}),
            "metadata": _METADATA,
        },
    ),
    "InputItem": _ITEM,
    "CompletionRequest": obj(
        {"model": _MODEL},
        {
            **_SAMPLING,
            **_STREAM,
            "prompt": any_of(string(), array(string(), 1, 16), array(integer(0, _INT32), 1, 8192)),
            "suffix": string(),
            "max_tokens": integer(0, _INT32),
            "n": integer(1, 8),
            "best_of": integer(1, 8),
            "echo": boolean(),
            "logprobs": integer(0, 5),
        },
    ),
    "EmbeddingsRequest": obj(
        {"model": _MODEL, "input": _TEXTS},
        {"dimensions": integer(1, 65536), "encoding_format": one_of("float", "base64"), "user": string()},
    ),
    "RankRequest": obj(
        {"model": _MODEL, "query": string(minLength=1), "documents": array(string(minLength=1), 1, 1000)},
        {"top_n": integer(1, _INT32), "return_documents": boolean()},
    ),
    "TokenizeRequest": obj(
        {},
        {
            "model": _MODEL,
            "prompt": string(),
            "messages": array(ref("ChatMessage"), 1),
            "add_special_tokens": boolean(),
        },
        "Either `prompt` or `messages`.",
    ),
    "DetokenizeRequest": obj({"tokens": array(integer(0, _INT32), high=8192)}, {"model": _MODEL}),
    "ModelRequest": obj({"model": _MODEL}),
    "McpTry": obj({"server": string(minLength=1, maxLength=64)}),
    "SpeechRequest": obj(
        {"model": _MODEL, "input": string(minLength=1, maxLength=4096, pattern=r"\S")},
        {
            "voice": any_of(string(maxLength=256), obj({"id": string(minLength=1, maxLength=256)})),
            "response_format": one_of("mp3", "opus", "aac", "flac", "wav", "pcm"),
            "speed": number(0.25, 4),
            "instructions": string(maxLength=4096),
            "stream_format": one_of("audio", "sse"),
        },
    ),
    "TranscriptionForm": obj(
        {"model": _MODEL, "file": string(format="binary", minLength=1)},
        {
            "language": string(maxLength=64),
            "prompt": string(maxLength=32_768),
            "response_format": one_of("json", "text", "srt", "verbose_json", "vtt"),
            "temperature": number(0, 1),
            "timestamp_granularities[]": array(one_of("word", "segment")),
            "include[]": array(one_of("logprobs")),
            "chunking_strategy": one_of("auto"),
            "stream": boolean(),
        },
        "With `response_format` text, srt or vtt the reply is plain text.",
    ),
    "LoadRequest": obj({"model": _MODEL}, {"stream": boolean()}),
    "NewConversation": obj({}, {"metadata": _METADATA, "items": array(ref("InputItem"), high=20)}),
    "ConversationChange": obj({}, {"metadata": _METADATA}),
    "NewItems": obj({"items": array(ref("InputItem"), 1, 20)}),
}

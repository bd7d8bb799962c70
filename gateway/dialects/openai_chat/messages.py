"""Chat messages of OpenAI's dialect → the contract's messages. Above: `request`; below: `fields`, `media`."""

from __future__ import annotations

from typing import Any

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.media import audio_part, file_part, image_part
from gateway.fields import Fields, dump_json, show, wrong_type
from gateway.links import Link

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_IMAGES = 32
MAX_TOOL_CALLS = 512
MAX_NAME_CHARS = 256
_NO_CAP = 1 << 62  # the body's own cap bounds it

_ROLES = {
    "system": pb.ROLE_SYSTEM,
    "developer": pb.ROLE_DEVELOPER,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
    "function": pb.ROLE_TOOL,
}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MEDIA_PARTS = {"input_audio": audio_part, "file": file_part}
_MAY_BE_EMPTY = {"assistant", "tool", "function"}


def parse_messages(body: Fields, links: list[Link]) -> list[pb.Message]:
    """Return the conversation; images given by address are added to `links`, and their parts have no data.

    Raises:
        InvalidRequest: missing or empty, or a message that no role and shape explains.
        UnsupportedParameter: a part that we do not read, by its name.
    """
    if body.raw("messages") is None:
        raise body.missing("messages")
    items = body.children("messages", MAX_MESSAGES)
    if not items:
        raise InvalidRequest("Invalid 'messages': empty array. Expected at least one message.", param="messages")
    messages = [_message(item, links) for item in items]
    num_images = sum(part.HasField("image") for message in messages for part in message.parts)
    if num_images > MAX_IMAGES:
        raise InvalidRequest(
            f"Invalid 'messages': too many images. Expected at most {MAX_IMAGES}, but got {num_images}.",
            param="messages",
        )
    return messages


def _message(item: Fields, links: list[Link]) -> pb.Message:
    role = item.raw("role")
    if role is None:
        raise item.missing("role")
    if not isinstance(role, str) or role not in _ROLES:
        names = ", ".join(f"'{name}'" for name in _ROLES)
        raise InvalidRequest(f"Invalid value: {show(role)}. Supported values are: {names}.", param=item.name_of("role"))
    message = pb.Message(
        role=_ROLES[role], parts=_parts(item, role, links), name=item.string("name", MAX_NAME_CHARS) or ""
    )
    if role == "assistant":
        message.tool_calls.extend(_tool_calls(item))
        message.reasoning = _text(item, "reasoning_content") or _text(item, "reasoning") or ""
    elif role in ("tool", "function"):
        message.tool_call_id = item.string("tool_call_id", MAX_NAME_CHARS) or ""
    return message


def _text(item: Fields, field: str) -> str | None:
    value = item.raw(field)
    return value if isinstance(value, str) else None


def _parts(item: Fields, role: str, links: list[Link]) -> list[pb.Part]:
    content = item.raw("content")
    if content is None:
        if role in _MAY_BE_EMPTY:
            return []
        raise item.missing("content")
    if isinstance(content, str):
        return [pb.Part(text=content)] if content else []
    if not isinstance(content, list):
        raise wrong_type(item.name_of("content"), "a string or an array of parts", content)
    parts = []
    for index, value in enumerate(item.array("content", MAX_PARTS) or []):
        name = f"{item.name_of('content')}[{index}]"
        if isinstance(value, str):
            parts.append(pb.Part(text=value))
        elif isinstance(value, dict):
            parts.append(_part(Fields(value, name), links))
        else:
            raise wrong_type(name, "an object", value)
    return parts


def _part(part: Fields, links: list[Link]) -> pb.Part:
    kind = part.raw("type")
    if kind is None and isinstance(part.raw("text"), str):
        kind = "text"
    if isinstance(kind, str) and (field := _TEXT_PARTS.get(kind)):
        text = part.string(field, _NO_CAP)
        if text is None:
            raise part.missing(field)
        return pb.Part(text=text)
    if kind == "image_url":
        return image_part(part, links)
    if isinstance(kind, str) and (read := _MEDIA_PARTS.get(kind)):
        return read(part)
    names = ", ".join(f"'{name}'" for name in ("text", "refusal", "image_url", *_MEDIA_PARTS))
    raise InvalidRequest(f"Invalid value: {show(kind)}. Supported values are: {names}.", param=part.name_of("type"))


def _tool_calls(item: Fields) -> list[pb.ToolCall]:
    calls = []
    for call in item.children("tool_calls", MAX_TOOL_CALLS):
        kind = call.raw("type")
        if kind not in (None, "function"):
            raise InvalidRequest(
                f"Invalid value: {show(kind)}. Supported values are: 'function'.", param=call.name_of("type")
            )
        function = call.required_child("function")
        calls.append(_call(function, call.string("id", MAX_NAME_CHARS) or ""))
    if (legacy := item.child("function_call")) is not None:
        calls.append(_call(legacy, ""))
    return calls


def _call(function: Fields, call_id: str) -> pb.ToolCall:
    name = function.string("name", MAX_NAME_CHARS)
    if not name:
        raise function.missing("name")
    arguments: Any = function.raw("arguments")
    if arguments is None:
        arguments = ""
    elif isinstance(arguments, dict):
        arguments = dump_json(arguments, function.name_of("arguments"))
    elif not isinstance(arguments, str):
        raise wrong_type(function.name_of("arguments"), "a string", arguments)
    return pb.ToolCall(id=call_id, name=name, arguments_json=arguments)

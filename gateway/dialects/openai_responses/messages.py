"""Items of a conversation → the contract's messages. Above: `request`; below: chat's media, `reasoning_text`.

Items are finer than messages: one turn of an assistant is a reasoning item, a message and several calls, and chat
templates want them as one message.
"""

from __future__ import annotations

from collections.abc import Sequence

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.media import audio_part, image_part, read_file
from gateway.dialects.openai_chat.messages import MAX_IMAGES
from gateway.dialects.openai_responses.items import Item
from gateway.dialects.openai_responses.mcp_items import error_text
from gateway.dialects.openai_responses.reasoning_text import reasoning_of
from gateway.dialects.openai_responses.tools import CUSTOM_INPUT, model_name
from gateway.fields import Fields, dump_json, show, wrong_type
from gateway.links import Link

_NO_CAP = 1 << 62
_ROLES = {
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "system": pb.ROLE_SYSTEM,
    "developer": pb.ROLE_DEVELOPER,
}
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal", "summary_text": "text"}
# What they say to a model is in the calls that came of them.
_UNSEEN = ("mcp_list_tools", "mcp_approval_request", "mcp_approval_response")
_INSTRUCTING = (pb.ROLE_SYSTEM, pb.ROLE_DEVELOPER)


def build_messages(instructions: str | None, items: Sequence[tuple[str, Item]], links: list[Link]) -> list[pb.Message]:
    """Return the conversation; images given by address are added to `links`, and their parts have no data.

    Args:
        instructions: of this request; they come first.
        items: each with the name that errors give it ("input[3]"), oldest first.

    Raises:
        InvalidRequest: a part of an item that no shape explains, or too many images.
        UnsupportedParameter: a part that we do not read, by its name.
    """
    messages: list[pb.Message] = []
    if instructions:
        messages.append(pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text=instructions)]))
    names: dict[str, str] = {}
    turn: pb.Message | None = None  # the assistant's, while its items go on

    def assistant() -> pb.Message:
        nonlocal turn
        if turn is None:
            turn = pb.Message(role=pb.ROLE_ASSISTANT)
            messages.append(turn)
        return turn

    for where, item in items:
        kind = item["type"]
        if kind == "reasoning":
            if text := reasoning_of(item):
                if turn is not None and (turn.parts or turn.tool_calls):
                    turn = None
                assistant().reasoning += text
        elif kind in ("function_call", "custom_tool_call"):
            name = model_name(item["name"], item.get("namespace", ""))
            arguments = (
                item["arguments"] if kind == "function_call" else dump_json({CUSTOM_INPUT: item["input"]}, where)
            )
            names[item["call_id"]] = name
            assistant().tool_calls.append(pb.ToolCall(id=item["call_id"], name=name, arguments_json=arguments))
        elif kind == "mcp_call":
            _add_mcp_call(messages, turn, item)
            turn = turn if turn is not None and turn.tool_calls and turn is messages[-1] else None
        elif kind in _UNSEEN:
            continue
        elif kind == "message" and item["role"] == "assistant":
            if turn is not None and (turn.parts or turn.tool_calls):
                turn = None
            assistant().parts.extend(_parts(item["content"], f"{where}.content", links))
        elif kind == "message":
            turn = None
            parts = _parts(item["content"], f"{where}.content", links)
            messages.append(pb.Message(role=_ROLES[item["role"]], parts=parts))
        else:
            turn = None
            call_id = item["call_id"]
            parts = _parts(item["output"], f"{where}.output", links)
            messages.append(
                pb.Message(role=pb.ROLE_TOOL, parts=parts, tool_call_id=call_id, name=names.get(call_id, ""))
            )
    _check_images(messages)
    return _instructions_joined(messages)


def _add_mcp_call(messages: list[pb.Message], turn: pb.Message | None, item: Item) -> None:
    """Add a call and its result: to the assistant's turn that led to it, or before one whose own calls still wait.

    Each stands alone, also where the model made several at once: items do not tell the one from the other, and so the
    prompt is the same when a later turn is made of them.
    """
    call = pb.ToolCall(
        id=item["id"], name=model_name(item["name"], item["server_label"]), arguments_json=item["arguments"]
    )
    text = item["output"] or "" if item.get("error") is None else f"Error: {error_text(item)}"
    result = pb.Message(role=pb.ROLE_TOOL, parts=[pb.Part(text=text)], tool_call_id=call.id, name=call.name)
    if turn is not None and not turn.tool_calls:
        turn.tool_calls.append(call)
        messages.append(result)
        return
    at = len(messages) - (turn is not None)
    messages[at:at] = [pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[call]), result]


def _check_images(messages: list[pb.Message]) -> None:
    num_images = sum(part.HasField("image") for message in messages for part in message.parts)
    if num_images > MAX_IMAGES:
        raise InvalidRequest(
            f"Invalid 'input': too many images. Expected at most {MAX_IMAGES}, but got {num_images}.", param="input"
        )


def _instructions_joined(messages: list[pb.Message]) -> list[pb.Message]:
    """Join the instructions and the developer's messages that open a conversation: most templates know one alone."""
    opening: list[pb.Message] = []
    for message in messages:
        if message.role not in _INSTRUCTING:
            break
        opening.append(message)
    if len(opening) < 2:
        return messages
    texts = ["".join(part.text for part in message.parts) for message in opening]
    joined = pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="\n\n".join(texts))])
    return [joined, *messages[len(opening) :]]


def _parts(content: object, name: str, links: list[Link]) -> list[pb.Part]:
    if isinstance(content, str):
        return [pb.Part(text=content)] if content else []
    parts = []
    for index, value in enumerate(content if isinstance(content, list) else []):
        where = f"{name}[{index}]"
        if not isinstance(value, dict):
            raise wrong_type(where, "an object", value)
        parts.append(_part(Fields(value, where), links))
    return parts


def _part(part: Fields, links: list[Link]) -> pb.Part:
    kind = part.raw("type")
    if isinstance(kind, str) and (field := _TEXTS.get(kind)):
        text = part.string(field, _NO_CAP)
        if text is None:
            raise part.missing(field)
        return pb.Part(text=text)
    if kind == "input_image":
        return _image(part, links)
    if kind == "input_audio":
        return audio_part(part)
    if kind == "input_file":
        return _file(part)
    names = ", ".join(f"'{name}'" for name in (*_TEXTS, "input_image", "input_audio", "input_file"))
    raise InvalidRequest(f"Invalid value: {show(kind)}. Supported values are: {names}.", param=part.name_of("type"))


def _image(part: Fields, links: list[Link]) -> pb.Part:
    if part.raw("file_id") is not None:
        name = part.name_of("file_id")
        raise UnsupportedParameter(f"'{name}' is not supported. Send the image itself in 'image_url'.", param=name)
    if part.raw("image_url") is None:
        raise part.missing("image_url")
    image = image_part(part, links)
    image.image.detail = part.choice("detail", ("auto", "low", "high", "original")) or image.image.detail
    return image


def _file(part: Fields) -> pb.Part:
    if part.raw("file_url") is not None:
        name = part.name_of("file_url")
        raise UnsupportedParameter(f"'{name}': files are not fetched. Send the file itself in 'file_data'.", param=name)
    return read_file(part)

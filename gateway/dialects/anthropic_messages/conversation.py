"""`system` and `messages` → the contract's messages. Above: `request`; below: `blocks`.

Anthropic's messages are coarser than those that chat templates know: results of tools stand in the user's message, and
the system may speak at any time. What opens the conversation becomes one system message, because most templates know
one alone; results become messages of their own, right after the calls; turns of one role are one turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.anthropic_messages.blocks import (
    NO_CAP,
    Pictures,
    is_foreign,
    read_blocks,
    read_parts,
    text_of,
    unknown_block,
)
from gateway.dialects.openai_chat.messages import MAX_IMAGES, MAX_TOOL_CALLS
from gateway.dialects.openai_responses.reasoning_text import unsealed
from gateway.fields import Fields, dump_json, wrong_type

MAX_MESSAGES = 16_384
MAX_ID_CHARS = 256
_ROLES = ("user", "assistant", "system")
# For Anthropic's accounting and of no meaning to a model; it differs between conversations that begin alike.
_BILLING = "x-anthropic-billing-header:"


@dataclass(slots=True)
class Conversation:
    """A conversation as the contract has it.

    Attributes:
        pictures: the images; links in the order of the image parts without data.
        tool_changes: tools that system messages offered (True) or withdrew (False), in order.
        effort: what the newest turn's system message asks for.
        continues: the last message is the beginning of the reply.
    """

    messages: list[pb.Message] = field(default_factory=list)
    pictures: Pictures = field(default_factory=Pictures)
    tool_changes: list[tuple[bool, Fields]] = field(default_factory=list)
    effort: str | None = None
    continues: bool = False


def parse_conversation(body: Fields) -> Conversation:
    """Return the conversation.

    Raises:
        InvalidRequest: missing or empty, or a message that no role and shape explains.
        UnsupportedParameter: a block that we do not read, by its name.
    """
    if body.raw("messages") is None:
        raise body.missing("messages")
    items = body.children("messages", MAX_MESSAGES)
    if not items:
        raise InvalidRequest("Invalid 'messages': empty array. Expected at least one message.", param="messages")
    made = Conversation()
    opening = [text for block in read_blocks(body, "system") if (text := _system_text(block))]
    names: dict[str, str] = {}
    is_answered = False
    last_user = max((i for i, item in enumerate(items) if item.raw("role") == "user"), default=-1)
    for index, item in enumerate(items):
        if item.raw("role") is None:
            raise item.missing("role")
        role = item.choice("role", _ROLES)
        if role == "system":
            texts = _system(item, made, is_newest=index > last_user)
            if item.choice("clear_at", ("next_user_message", "never")) == "next_user_message" and index < last_user:
                continue
            if is_answered:
                _say(made, pb.ROLE_SYSTEM, [pb.Part(text=text) for text in texts])
            else:
                opening += texts
        elif role == "user":
            _user(item, made, names)
        else:
            is_answered = True
            _assistant(item, made, names)
    if not made.messages:
        raise InvalidRequest("Invalid 'messages': none of them says anything.", param="messages")
    _check_end(made, items[-1])
    _check_images(made)
    if opening:
        made.messages.insert(0, pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="\n\n".join(opening))]))
    return made


def _check_end(made: Conversation, item: Fields) -> None:
    last = made.messages[-1]
    made.continues = last.role == pb.ROLE_ASSISTANT
    if made.continues and last.tool_calls:
        raise InvalidRequest(
            "The last message calls tools: a user's message with a 'tool_result' for each call must follow it.",
            param=item.name_of("content"),
        )


def _check_images(made: Conversation) -> None:
    num_images = sum(part.HasField("image") for message in made.messages for part in message.parts)
    if num_images > MAX_IMAGES:
        raise InvalidRequest(
            f"Invalid 'messages': too many images. Expected at most {MAX_IMAGES}, but got {num_images}.",
            param="messages",
        )


def _system_text(block: Fields) -> str:
    if block.raw("type") != "text":
        raise unknown_block(block, ("text",))
    text = text_of(block)
    return "" if text.startswith(_BILLING) else text


def _system(item: Fields, made: Conversation, *, is_newest: bool) -> list[str]:
    """Return what a system message says, and note what it changes."""
    config = item.child("output_config")
    if config is not None and is_newest:
        made.effort = config.string("effort", 32) or made.effort
    texts = []
    for block in read_blocks(item):
        kind = block.raw("type")
        if kind in ("tool_addition", "tool_removal"):
            made.tool_changes.append((kind == "tool_addition", block.required_child("tool")))
        elif text := _system_text(block):
            texts.append(text)
    return texts


def _user(item: Fields, made: Conversation, names: dict[str, str]) -> None:
    blocks = read_blocks(item)
    if item.raw("content") is None:
        raise item.missing("content")
    images: list[pb.Part] = []
    # Results first, whatever stands before them: a template wants them right after the calls.
    for block in blocks:
        if block.raw("type") == "tool_result":
            images += _tool_result(block, made, names)
    rest = read_parts([block for block in blocks if block.raw("type") != "tool_result"], made.pictures)
    _say(made, pb.ROLE_USER, [*images, *rest])


def _tool_result(block: Fields, made: Conversation, names: dict[str, str]) -> list[pb.Part]:
    """Add a tool's message. Its images are returned instead: few templates take them anywhere but from a user."""
    call_id = block.string("tool_use_id", MAX_ID_CHARS)
    if not call_id:
        raise block.missing("tool_use_id")
    parts = read_parts(read_blocks(block), made.pictures)
    pieces: list[str] = []
    for index, part in enumerate(parts):
        if part.HasField("text"):
            # Where a picture stood between two texts, nothing has parted them yet.
            is_next = pieces and parts[index - 1].HasField("image")
            pieces.append(f"\n{part.text}" if is_next else part.text)
    texts = "".join(pieces)
    if block.boolean("is_error"):
        texts = f"Error: {texts}" if texts else "Error"
    made.messages.append(
        pb.Message(
            role=pb.ROLE_TOOL,
            parts=[pb.Part(text=texts)] if texts else [],
            tool_call_id=call_id,
            name=names.get(call_id, ""),
        )
    )
    return [part for part in parts if part.HasField("image")]


def _assistant(item: Fields, made: Conversation, names: dict[str, str]) -> None:
    turn = pb.Message(role=pb.ROLE_ASSISTANT)
    thoughts: list[str] = []
    for block in read_blocks(item):
        kind = block.raw("type")
        if kind == "text":
            turn.parts.append(pb.Part(text=text_of(block)))
        elif kind == "tool_use":
            call = _tool_use(block)
            names[call.id] = call.name
            turn.tool_calls.append(call)
        elif kind == "thinking":
            signature = block.string("signature", NO_CAP) or ""
            thoughts.append(block.string("thinking", NO_CAP) or unsealed(signature))
        elif kind == "compaction":
            turn.parts.extend(read_parts([block], made.pictures))
        elif kind != "redacted_thinking" and not is_foreign(kind):
            raise unknown_block(block, ("text", "tool_use", "thinking", "redacted_thinking"))
    if len(turn.tool_calls) > MAX_TOOL_CALLS:
        raise InvalidRequest(f"More than {MAX_TOOL_CALLS} calls of tools.", param=item.name_of("content"))
    turn.reasoning = "".join(thoughts)
    if not (turn.parts or turn.tool_calls or turn.reasoning):
        return
    last = made.messages[-1] if made.messages else None
    if last is not None and last.role == pb.ROLE_ASSISTANT and not (last.tool_calls or turn.reasoning):
        last.MergeFrom(turn)
    else:
        made.messages.append(turn)


def _tool_use(block: Fields) -> pb.ToolCall:
    call_id, name = block.string("id", MAX_ID_CHARS), block.string("name", MAX_ID_CHARS)
    if not call_id:
        raise block.missing("id")
    if not name:
        raise block.missing("name")
    value = {} if block.raw("input") is None else block.raw("input")
    if not isinstance(value, dict):
        raise wrong_type(block.name_of("input"), "an object", value)
    return pb.ToolCall(id=call_id, name=name, arguments_json=dump_json(value, block.name_of("input")))


def _say(made: Conversation, role: pb.Role.ValueType, parts: list[pb.Part]) -> None:
    """Add to the last message if it is of the same role, else begin one."""
    if not parts:
        return
    last = made.messages[-1] if made.messages else None
    if last is None or last.role != role:
        last = pb.Message(role=role)
        made.messages.append(last)
    elif last.parts and last.parts[-1].HasField("text") and parts[0].HasField("text"):
        parts[0].text = f"\n\n{parts[0].text}"
    last.parts.extend(parts)

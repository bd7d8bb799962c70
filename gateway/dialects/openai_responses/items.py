"""A request's `input` → items in one stored form: each an object with `type`, `id` and whatever its kind needs.

Above: `request`, the store's routes; below: `foreign`, `mcp_input`, `fields`.

Read here is what an item is; what its content says is read by `messages`, which sees stored items again in later turns.
Items of kinds that only OpenAI's own tools make are left out: nothing that a model here could read is lost with them.
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from hostler.errors import InvalidRequest

from gateway.dialects.openai_responses.foreign import spelled_out
from gateway.dialects.openai_responses.mcp_input import READERS as MCP_READERS
from gateway.fields import Fields, dump_json, show, wrong_type

Item = dict[str, Any]

MAX_ITEMS = 4096
MAX_PARTS = 4096
MAX_ID_CHARS = 256
_NO_CAP = 1 << 62  # the body's own cap bounds it
_ROLES = ("user", "assistant", "system", "developer")
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,256}")
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "mcp_list_tools": "mcpl",
    "mcp_call": "mcp",
    "mcp_approval_request": "mcpr",
    "mcp_approval_response": "mcpa",
}


def new_id(prefix: str) -> str:
    """Return a new id of a response, item or conversation."""
    return f"{prefix}_{uuid.uuid4().hex}"


def item_id(kind: str) -> str:
    """Return a new id for an item of a kind."""
    return new_id(_PREFIXES[kind])


def parse_input(body: Fields, field: str = "input") -> list[Item] | None:
    """Return the items of a request; None when it has no such field. References are resolved later.

    Raises:
        InvalidRequest: an item that no shape explains; `param` names it.
    """
    value = body.raw(field)
    if value is None:
        return None
    name = body.name_of(field)
    if isinstance(value, str):
        return [user_message(value)]
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of items", value)
    items: list[Item] = []
    for index, entry in enumerate(body.array(field, MAX_ITEMS) or []):
        where = f"{name}[{index}]"
        if isinstance(entry, str):
            items.append(user_message(entry))
        elif isinstance(entry, dict):
            for plain in spelled_out(entry):
                item = _item(Fields(plain, where))
                if item is not None:
                    items.append(item)
        else:
            raise wrong_type(where, "an object", entry)
    if len(items) > MAX_ITEMS:
        raise InvalidRequest(f"Invalid '{name}': more than {MAX_ITEMS} items.", param=name)
    return items


def user_message(text: str) -> Item:
    """Return a user's message of one text."""
    return {
        "id": item_id("message"),
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [{"type": "input_text", "text": text}],
    }


def _item(item: Fields) -> Item | None:
    kind = item.raw("type")
    if kind is None:
        kind = "message" if item.raw("role") is not None else "item_reference" if item.raw("id") is not None else None
    if not isinstance(kind, str):
        raise item.missing("type") if kind is None else wrong_type(item.name_of("type"), "a string", kind)
    if kind == "item_reference":
        return {"type": kind, "id": _required(item, "id", MAX_ID_CHARS), "_name": item.name_of("id")}
    read = _READERS.get(kind)
    if read is None:
        return None
    return {"id": _own_id(item, kind), "type": kind, **read(item)}


def _own_id(item: Fields, kind: str) -> str:
    given = item.raw("id")
    return given if isinstance(given, str) and _ID.fullmatch(given) else item_id(kind)


def _required(item: Fields, field: str, max_chars: int) -> str:
    value = item.string(field, max_chars)
    if not value:
        raise item.missing(field)
    return value


def _message(item: Fields) -> Item:
    role = item.raw("role")
    if role is None:
        raise item.missing("role")
    if role not in _ROLES:
        names = ", ".join(f"'{name}'" for name in _ROLES)
        raise InvalidRequest(f"Invalid value: {show(role)}. Supported values are: {names}.", param=item.name_of("role"))
    content = item.raw("content")
    text_type = "output_text" if role == "assistant" else "input_text"
    if content is None and role == "assistant":
        content = []
    if content is None:
        raise item.missing("content")
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        raise wrong_type(item.name_of("content"), "a string or an array of parts", content)
    if len(content) > MAX_PARTS:
        raise InvalidRequest(f"Invalid '{item.name_of('content')}': more than {MAX_PARTS} parts.", param="input")
    parts = [_part(part, text_type) for part in content]
    return {"status": "completed", "role": role, "content": parts}


def _part(part: object, text_type: str) -> Any:
    if isinstance(part, str):
        part = {"type": text_type, "text": part}
    if not isinstance(part, dict):
        return part  # `messages` refuses it by its place
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text") or (kind is None and isinstance(part.get("text"), str)):
        part = {"type": text_type, "text": part.get("text")}
        if text_type == "output_text":
            part |= {"annotations": [], "logprobs": []}
        return part
    # Only what is read is kept: strangers' keys could not be written again, or would not fit clients' types.
    known = {
        key: part[key]
        for key in _PART_KEYS.get(kind if isinstance(kind, str) else "", ("type",))
        if part.get(key) is not None
    }
    if kind == "input_image":
        image = known.get("image_url")
        known["image_url"] = image.get("url") if isinstance(image, dict) else image
        known.setdefault("detail", "auto")
    elif kind == "input_audio" and isinstance(audio := known.get("input_audio"), dict):
        known["input_audio"] = {key: audio.get(key) for key in ("data", "format")}
    return known


def _function_call(item: Fields) -> Item:
    arguments = item.raw("arguments")
    if isinstance(arguments, dict):
        arguments = dump_json(arguments, item.name_of("arguments"))
    elif arguments is not None and not isinstance(arguments, str):
        raise wrong_type(item.name_of("arguments"), "a string", arguments)
    namespace = item.string("namespace", MAX_ID_CHARS)
    return {
        "status": "completed",
        "call_id": item.string("call_id", MAX_ID_CHARS) or "",
        "name": _required(item, "name", MAX_ID_CHARS),
        "arguments": arguments or "",
        **({"namespace": namespace} if namespace else {}),
    }


def _custom_call(item: Fields) -> Item:
    namespace = item.string("namespace", MAX_ID_CHARS)
    return {
        "status": "completed",
        "call_id": item.string("call_id", MAX_ID_CHARS) or "",
        "name": _required(item, "name", MAX_ID_CHARS),
        "input": item.string("input", _NO_CAP) or "",
        **({"namespace": namespace} if namespace else {}),
    }


def _call_output(item: Fields) -> Item:
    output = item.raw("output")
    if output is None:
        raise item.missing("output")
    if isinstance(output, list):
        if len(output) > MAX_PARTS:
            raise InvalidRequest(f"Invalid '{item.name_of('output')}': more than {MAX_PARTS} parts.", param="input")
        output = [_part(part, "input_text") for part in output]
    elif isinstance(output, dict):
        output = dump_json(output, item.name_of("output"))
    elif not isinstance(output, str):
        raise wrong_type(item.name_of("output"), "a string or an array of parts", output)
    return {"status": "completed", "call_id": item.string("call_id", MAX_ID_CHARS) or "", "output": output}


def _thoughts(item: Fields, field: str, kind: str) -> list[dict[str, str]]:
    parts = item.array(field, MAX_PARTS) or []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return [{"type": kind, "text": text} for text in texts if isinstance(text, str)]


def _reasoning(item: Fields) -> Item:
    content, summary = _thoughts(item, "content", "reasoning_text"), _thoughts(item, "summary", "summary_text")
    encrypted = item.string("encrypted_content", _NO_CAP)
    return {
        "summary": summary,
        **({"content": content} if content else {}),
        **({"encrypted_content": encrypted} if encrypted else {}),
    }


_PART_KEYS = {
    "input_image": ("type", "image_url", "file_id", "detail"),
    "input_audio": ("type", "input_audio"),
    "input_file": ("type", "file_data", "filename", "file_url", "file_id"),
    "refusal": ("type", "refusal"),
}
_READERS = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _call_output,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _call_output,
    "reasoning": _reasoning,
    **MCP_READERS,
}

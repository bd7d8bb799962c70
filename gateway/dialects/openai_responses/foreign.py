"""Items as other dialects write them → items of this one. Above: `items`.

Cursor's agent sends conversations that mix three dialects in one list: responses' items, chat's `tool_calls` and `tool`
messages, and Anthropic's content blocks. What is not foreign passes as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Entry = dict[str, Any]

# A tuple, not a set: what a client calls a type may be of any kind, and a set would have to hash it.
BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")


def spelled_out(entry: Entry) -> Iterator[Entry]:
    """Yield the items that an entry of `input` stands for; usually itself."""
    content = entry.get("content")
    if entry.get("type") not in (None, "message") or "role" not in entry:
        yield entry
    elif entry["role"] in ("tool", "function"):
        yield {
            "type": "function_call_output",
            "call_id": entry.get("tool_call_id"),
            "output": "" if content is None else content,
        }
    elif entry.get("tool_calls"):
        yield from _chat_calls(entry)
    elif isinstance(content, list) and any(isinstance(b, dict) and b.get("type") in BLOCKS for b in content):
        yield from _blocks(entry, content)
    elif isinstance(content, list):
        yield {**entry, "content": [_image(part) for part in content]}
    else:
        yield entry


def _chat_calls(entry: Entry) -> Iterator[Entry]:
    if entry.get("content"):
        yield {key: value for key, value in entry.items() if key != "tool_calls"}
    calls = entry["tool_calls"]
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield {
                "type": "function_call",
                "call_id": call.get("id"),
                "name": function.get("name"),
                "arguments": function.get("arguments"),
            }


def _blocks(entry: Entry, content: list[Any]) -> Iterator[Entry]:
    texts: list[Any] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in BLOCKS:
            texts.append(_image(block))
            continue
        if texts:
            yield {**entry, "content": texts}
            texts = []
        if kind == "tool_use":
            yield {
                "type": "function_call",
                "call_id": block.get("id"),
                "name": block.get("name"),
                "arguments": block.get("input") or {},
            }
        elif kind == "tool_result":
            output = block.get("content")
            yield {
                "type": "function_call_output",
                "call_id": block.get("tool_use_id"),
                "output": [_image(part) for part in output] if isinstance(output, list) else output or "",
            }
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            yield {
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": block["thinking"]}],
            }
    if texts:
        yield {**entry, "content": texts}


def _image(block: Any) -> Any:
    """Return an image of chat's or Anthropic's shape as this dialect's; anything else as it is."""
    if not isinstance(block, dict):
        return block
    if block.get("type") == "image" and isinstance(source := block.get("source"), dict):
        inline = f"data:{source.get('media_type') or ''};base64,{source.get('data') or ''}"
        url = inline if source.get("type") == "base64" else source.get("url")
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    if block.get("type") == "image_url":
        image = block.get("image_url")
        url, detail = (image.get("url"), image.get("detail")) if isinstance(image, dict) else (image, None)
        return {"type": "input_image", "image_url": url, "detail": detail or "auto"}
    return block

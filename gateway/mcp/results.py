"""What a tool returned → text for a model. Pure. Above: `connection`, `calls`."""

from __future__ import annotations

import json
from dataclasses import dataclass

import mcp_types


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool said.

    Attributes:
        is_error: the tool says that it failed; its text says how.
    """

    text: str
    is_error: bool = False


def read_result(result: mcp_types.CallToolResult) -> Result:
    """Return a result's text. What is no text is named, not shown: models here get it as text only."""
    texts = [text for block in result.content if (text := _text_of(block))]
    if not texts and result.structured_content is not None:
        texts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return Result("\n".join(texts), bool(result.is_error))


def _text_of(block: mcp_types.ContentBlock) -> str:
    if isinstance(block, mcp_types.TextContent):
        return block.text
    if isinstance(block, mcp_types.ImageContent | mcp_types.AudioContent):
        return f"[{block.type} of type {block.mime_type}, {len(block.data) * 3 // 4} bytes]"
    if isinstance(block, mcp_types.ResourceLink):
        return f"[{block.name}: {block.uri}]"
    inner = block.resource
    if isinstance(inner, mcp_types.TextResourceContents):
        return inner.text
    return f"[{inner.uri}, {len(inner.blob) * 3 // 4} bytes]"

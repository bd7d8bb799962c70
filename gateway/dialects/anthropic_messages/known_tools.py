"""Tools that Anthropic defined and clients run, spelled out for models that were not taught them. Above: `tools`.

A request names them by a dated type alone ("bash_20250124") and holds no schema. Those that Anthropic's servers run
(web search, code execution) have nobody here to run them.
"""

from __future__ import annotations

from typing import Any

from hostler.inference.v1 import inference_pb2 as pb

from gateway.fields import Fields, dump_json

_TEXT: dict[str, Any] = {"type": "string"}
_WHOLE: dict[str, Any] = {"type": "integer"}
_PATH: dict[str, Any] = {"type": "string", "description": "Absolute path of a file or directory."}
_RANGE: dict[str, Any] = {
    "type": "array",
    "items": _WHOLE,
    "minItems": 2,
    "maxItems": 2,
    "description": "For view: first and last line, from 1; a last line of -1 means the end.",
}


def _schema(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


_EDITING = _schema(
    ["command", "path"],
    command={"type": "string", "enum": ["view", "create", "str_replace", "insert"]},
    path=_PATH,
    file_text={**_TEXT, "description": "For create: the whole text of the file."},
    old_str={**_TEXT, "description": "For str_replace: the text to replace; it must occur exactly once."},
    new_str={**_TEXT, "description": "For str_replace: the text that takes its place."},
    insert_line={**_WHOLE, "description": "For insert: the line after which to insert; 0 is the beginning."},
    insert_text={**_TEXT, "description": "For insert: the text to insert."},
    view_range=_RANGE,
)
_REMEMBERING = _schema(
    ["command"],
    command={"type": "string", "enum": ["view", "create", "str_replace", "insert", "delete", "rename"]},
    path={**_PATH, "description": "Path of a file or directory under /memories."},
    file_text={**_TEXT, "description": "For create: the whole text of the file."},
    old_str={**_TEXT, "description": "For str_replace: the text to replace."},
    new_str={**_TEXT, "description": "For str_replace: the text that takes its place."},
    insert_line={**_WHOLE, "description": "For insert: the line after which to insert."},
    insert_text={**_TEXT, "description": "For insert: the text to insert."},
    old_path={**_PATH, "description": "For rename: the path now."},
    new_path={**_PATH, "description": "For rename: the path to be."},
    view_range=_RANGE,
)
_SHELL = _schema(
    [],
    command={**_TEXT, "description": "The command to run."},
    restart={"type": "boolean", "description": "Start the shell anew instead."},
)
# The type without its date → name, description, schema.
_KNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bash": ("bash", "Run a command in a bash shell that keeps its state between calls.", _SHELL),
    "text_editor": ("str_replace_based_edit_tool", "View, create and edit text files.", _EDITING),
    "memory": ("memory", "Keep notes in files under /memories, for later conversations.", _REMEMBERING),
}


def known_tool(kind: str, item: Fields) -> pb.Tool | None:
    """Return the tool that a dated type stands for, under the name that the request gives it; None for one not ours."""
    known = _KNOWN.get(kind.rstrip("0123456789").rstrip("_"))
    if known is None:
        return None
    usual, description, schema = known
    name = item.string("name", 128) or usual
    return pb.Tool(name=name, description=description, parameters_json=dump_json(schema, "tools"))

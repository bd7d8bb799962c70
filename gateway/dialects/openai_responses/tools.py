"""Tools of a responses request → the contract, and back: which item a call by the model becomes.

Above: `request`, `messages`, `builder`; below: the chat dialect's function reader.

A model knows functions with flat names. `ToolTable` remembers what each name stands for: a function, a custom tool
(free text, which the model writes as the one string of a JSON object), or either inside a namespace. A further source
of tools is a further `kind` here, and whoever executes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.tools import (
    MAX_DESCRIPTION_CHARS,
    MAX_NAME_CHARS,
    MAX_TOOLS,
    MODES,
    choice_of_word,
    read_function,
)
from gateway.fields import Fields, dump_json, show, wrong_type

CUSTOM_INPUT = "input"
"""The one property of the object in which a model writes a custom tool's text."""
MAX_GRAMMAR_CHARS = 256 * 1024
_OURS = ("function", "custom")


@dataclass(frozen=True, slots=True)
class ToolBinding:
    """What a name that the model may call stands for.

    Attributes:
        kind: "function" or "custom".
        name: as the client knows it.
        namespace: empty outside of one.
    """

    kind: str
    name: str
    namespace: str = ""


def model_name(name: str, namespace: str) -> str:
    """Return the flat name by which the model knows a tool of a namespace."""
    if not namespace:
        return name
    return namespace + name if namespace.endswith("__") else f"{namespace}__{name}"


@dataclass(frozen=True, slots=True)
class ToolTable:
    """The tools of one request.

    Attributes:
        tools: as the model sees them.
        bindings: the model's name for a tool → what it stands for.
        echo: as the response object repeats them.
    """

    tools: tuple[pb.Tool, ...] = ()
    bindings: dict[str, ToolBinding] = field(default_factory=dict)
    echo: tuple[dict[str, Any], ...] = ()

    def binding(self, called: str) -> ToolBinding:
        """Return what a name that the model called stands for; an unknown one is a function of that name."""
        return self.bindings.get(called) or ToolBinding("function", called)


def parse_tools(body: Fields) -> ToolTable:
    """Return the tools that the model may call. Tools that only OpenAI hosts are left out.

    Raises:
        InvalidRequest: malformed, or two tools of one name.
        UnsupportedParameter: a tool of an MCP server.
    """
    tools: list[pb.Tool] = []
    bindings: dict[str, ToolBinding] = {}
    echo: list[dict[str, Any]] = []

    def add(fields: Fields, namespace: str, note: str) -> None:
        kind = _kind(fields)
        tool = _custom(fields) if kind == "custom" else _function(fields)
        binding = ToolBinding(kind, tool.name, namespace)
        tool.name = model_name(tool.name, namespace)
        if tool.name in bindings:
            raise InvalidRequest(f"Two tools have the name {show(tool.name)}.", param=fields.name_of("name"))
        if note:
            tool.description = f"{note}\n{tool.description}".strip()
        tools.append(tool)
        bindings[tool.name] = binding

    for item in body.children("tools", MAX_TOOLS):
        kind = _kind(item)
        if kind in _OURS:
            add(item, "", "")
        elif kind == "namespace":
            _add_namespace(item, add)
        elif kind == "mcp":
            name = item.name_of("type")
            raise UnsupportedParameter(f"'{name}' 'mcp' is not supported. Remove the tool.", param=name)
        else:
            continue  # hosted by OpenAI: clients list them by habit and live without
        echo.append(_echo(item, kind))
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"Invalid 'tools': more than {MAX_TOOLS} tools.", param="tools")
    return ToolTable(tuple(tools), bindings, tuple(echo))


def _kind(item: Fields) -> str:
    kind = item.raw("type")
    if kind is None:
        return "function"
    if not isinstance(kind, str):
        raise wrong_type(item.name_of("type"), "a string", kind)
    return kind


def _add_namespace(item: Fields, add: Callable[[Fields, str, str], None]) -> None:
    namespace = item.string("name", MAX_NAME_CHARS)
    if not namespace:
        raise item.missing("name")
    description = item.string("description", MAX_DESCRIPTION_CHARS) or ""
    # Models have no place for a namespace's own description, so the first of its tools carries it.
    note = f"[{namespace}] {description}" if description else ""
    for member in item.children("tools", MAX_TOOLS):
        if _kind(member) in _OURS:
            add(member, namespace, note)
            note = ""


def _function(item: Fields) -> pb.Tool:
    return read_function(item.child("function") or item)


def _custom(item: Fields) -> pb.Tool:
    inner = item.child("custom") or item
    name = inner.string("name", MAX_NAME_CHARS)
    if not name:
        raise inner.missing("name")
    text: dict[str, Any] = {"type": "string"}
    notes = [inner.string("description", MAX_DESCRIPTION_CHARS) or ""]
    strict = False
    form = inner.child("format")
    if form is not None and form.choice("type", ("text", "grammar")) == "grammar":
        grammar = form.child("grammar") or form
        definition = grammar.string("definition", MAX_GRAMMAR_CHARS)
        if not definition:
            raise grammar.missing("definition")
        if grammar.choice("syntax", ("lark", "regex")) == "regex":
            text["pattern"] = f"^(?:{definition})$"
            strict = True
        else:
            notes.append(f"Write '{CUSTOM_INPUT}' so that it follows this Lark grammar:\n{definition}")
    schema = {
        "type": "object",
        "properties": {CUSTOM_INPUT: text},
        "required": [CUSTOM_INPUT],
        "additionalProperties": False,
    }
    return pb.Tool(
        name=name,
        description="\n".join(note for note in notes if note),
        parameters_json=dump_json(schema, inner.name_of("format")),
        strict=strict,
    )


def _echo(item: Fields, kind: str) -> dict[str, Any]:
    """Return a tool as the response repeats it: every key that clients' types demand is there."""
    if kind == "namespace":
        members = [_echo(tool, _kind(tool)) for tool in item.children("tools", MAX_TOOLS) if _kind(tool) in _OURS]
        return {
            "type": kind,
            "name": item.raw("name"),
            "description": item.raw("description") or "",
            "tools": members,
        }
    if kind == "custom":
        inner = item.child("custom") or item
        form = inner.object("format") or {"type": "text"}
        if isinstance(nested := form.get("grammar"), dict):
            form = {"type": "grammar", **nested}
        return {
            "type": kind,
            "name": inner.raw("name"),
            "description": inner.raw("description"),
            "format": form,
        }
    inner = item.child("function") or item
    parameters = inner.object("parameters")
    return {
        "type": "function",
        "name": inner.raw("name"),
        "description": inner.raw("description"),
        "parameters": inner.object("input_schema") if parameters is None else parameters,
        "strict": bool(inner.raw("strict")),
    }


def parse_tool_choice(body: Fields, table: ToolTable) -> pb.ToolChoice | None:
    """Return how tools may be used, or None when the request says nothing about it.

    Raises:
        InvalidRequest: a call is demanded of a tool that is not in `tools`, or of none at all.
        UnsupportedParameter: a call is demanded of a tool that only OpenAI hosts.
    """
    choice = _choice(body, table)
    parallel = body.boolean("parallel_tool_calls")
    if choice is None and parallel is None:
        return None
    choice = choice or pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO)
    if choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED and not table.tools:
        raise InvalidRequest("'tool_choice' demands a call, but 'tools' is empty.", param="tool_choice")
    if parallel is not None and not choice.HasField("parallel"):
        choice.parallel = parallel
    return choice


def _choice(body: Fields, table: ToolTable) -> pb.ToolChoice | None:
    value = body.raw("tool_choice")
    if value is None:
        return None
    if isinstance(value, str):
        return choice_of_word(value)
    if not isinstance(value, dict):
        raise wrong_type("tool_choice", "a string or an object", value)
    choice = Fields(value, "tool_choice")
    kind = choice.string("type", 64)
    if kind is None:
        raise choice.missing("type")
    if kind == "allowed_tools":
        allowed = choice.child("allowed_tools") or choice
        mode = allowed.choice("mode", ("auto", "required")) or "auto"
        named = [tool for tool in allowed.children("tools", MAX_TOOLS) if _kind(tool) in _OURS]
        allowed_names = [_named(tool, table) for tool in named]
        if not allowed_names:
            return pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE)
        return pb.ToolChoice(mode=MODES[mode], allowed_names=allowed_names)
    if kind not in _OURS:
        raise UnsupportedParameter(
            f"'tool_choice' demands {show(kind)}, which is not served here.", param="tool_choice"
        )
    # A named tool is called once, whatever parallel_tool_calls says.
    return pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED, allowed_names=[_named(choice, table)], parallel=False)


def _named(value: Fields, table: ToolTable) -> str:
    """Return the model's name for a tool that the client names, with its namespace or, if only one fits, without."""
    inner = value.child(_kind(value)) or value
    name = inner.string("name", MAX_NAME_CHARS)
    if not name:
        raise inner.missing("name")
    namespace = inner.string("namespace", MAX_NAME_CHARS)
    if namespace is not None or name in table.bindings:
        candidates: Iterable[str] = [model_name(name, namespace or "")]
    else:
        candidates = [known for known, binding in table.bindings.items() if binding.name == name]
    found = [candidate for candidate in candidates if candidate in table.bindings]
    if len(found) != 1:
        raise InvalidRequest(f"'tool_choice' names {show(name)}, which is not in 'tools'.", param="tool_choice")
    return found[0]

"""Tools of a responses request → the contract, and back: which item a call by the model becomes.

Above: `request`, `messages`, `builder`; below: the chat dialect's function reader.

A model knows functions with flat names. `ToolTable` remembers what each name stands for: a function, a custom tool
(free text, which the model writes as the one string of a JSON object), either inside a namespace, or a tool of an MCP
server, which is called here. The latter are known only when the server has been asked (`ToolTable.with_remote`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.tools import (
    MAX_DESCRIPTION_CHARS,
    MAX_NAME_CHARS,
    MAX_TOOLS,
    read_function,
)
from gateway.dialects.openai_responses.mcp_tools import MAX_SERVERS, McpSpec, echo_mcp, read_mcp
from gateway.fields import Fields, dump_json, show, wrong_type
from gateway.mcp.remote import Listing, RemoteTool

CUSTOM_INPUT = "input"
"""The one property of the object in which a model writes a custom tool's text."""
MAX_GRAMMAR_CHARS = 256 * 1024
OURS = ("function", "custom")


@dataclass(frozen=True, slots=True)
class ToolBinding:
    """What a name that the model may call stands for.

    Attributes:
        kind: "function", "custom" or "mcp".
        name: as the client knows it.
        namespace: empty outside of one; of an MCP server's tool its label.
        remote: of an MCP server's tool: what it is.
        needs_approval: it is not called before somebody has said yes.
    """

    kind: str
    name: str
    namespace: str = ""
    remote: RemoteTool | None = None
    needs_approval: bool = False


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
        mcp: MCP servers whose tools are wanted.
        chosen: their tools that `tool_choice` names: each a label and a tool, or None for all of that server.
    """

    tools: tuple[pb.Tool, ...] = ()
    bindings: dict[str, ToolBinding] = field(default_factory=dict)
    echo: tuple[dict[str, Any], ...] = ()
    mcp: tuple[McpSpec, ...] = ()
    chosen: tuple[tuple[str, str | None], ...] = ()

    def binding(self, called: str) -> ToolBinding:
        """Return what a name that the model called stands for; an unknown one is a function of that name."""
        return self.bindings.get(called) or ToolBinding("function", called)

    def with_remote(self, listings: Sequence[tuple[McpSpec, Listing]]) -> ToolTable:
        """Return the table with the tools that servers offer: under their own names where nothing else has them."""
        offered = [(spec, tool) for spec, listing in listings for tool in listing.tools]
        shared = Counter([*self.bindings, *(tool.name for _, tool in offered)])
        tools, bindings = list(self.tools), dict(self.bindings)
        for spec, tool in offered:
            name = tool.name if shared[tool.name] == 1 else model_name(tool.name, spec.label)
            if name in bindings or len(tools) >= MAX_TOOLS:
                continue
            tools.append(remote_tool(name, tool))
            bindings[name] = ToolBinding("mcp", tool.name, spec.label, tool, spec.approval.is_needed(tool))
        return replace(self, tools=tuple(tools), bindings=bindings)

    def own_names(self) -> list[str]:
        """Return the names of the tools that the client itself runs."""
        return [name for name, binding in self.bindings.items() if binding.kind != "mcp"]

    def chosen_names(self) -> list[str]:
        """Return the names of the servers' tools that `tool_choice` names."""
        return [
            name
            for name, binding in self.bindings.items()
            if binding.kind == "mcp"
            and any(label == binding.namespace and tool in (None, binding.name) for label, tool in self.chosen)
        ]


def remote_tool(name: str, tool: RemoteTool) -> pb.Tool:
    """Return an MCP server's tool as a model sees it, under a name of ours."""
    return pb.Tool(name=name, description=tool.description, parameters_json=dump_json(tool.input_schema, "tools"))


def parse_tools(body: Fields) -> ToolTable:
    """Return the tools that the model may call. Tools that only OpenAI hosts are left out.

    Raises:
        InvalidRequest: malformed, or two tools of one name.
    """
    mcp: list[McpSpec] = []
    tools: list[pb.Tool] = []
    bindings: dict[str, ToolBinding] = {}
    echo: list[dict[str, Any]] = []

    def add(fields: Fields, namespace: str, note: str) -> None:
        kind = kind_of_tool(fields)
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
        kind = kind_of_tool(item)
        if kind in OURS:
            add(item, "", "")
        elif kind == "namespace":
            _add_namespace(item, add)
        elif kind == "mcp":
            mcp.append(read_mcp(item))
        else:
            continue  # hosted by OpenAI: clients list them by habit and live without
        echo.append(_echo(item, kind))
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"Invalid 'tools': more than {MAX_TOOLS} tools.", param="tools")
    _check_servers(mcp)
    return ToolTable(tuple(tools), bindings, tuple(echo), tuple(mcp))


def _check_servers(mcp: list[McpSpec]) -> None:
    if len(mcp) > MAX_SERVERS:
        raise InvalidRequest(f"Invalid 'tools': more than {MAX_SERVERS} MCP servers.", param="tools")
    for number, spec in enumerate(mcp):
        if any(spec.label == other.label for other in mcp[:number]):
            raise InvalidRequest(
                f"Two MCP servers have the label {show(spec.label)}.", param=f"{spec.where}.server_label"
            )


def kind_of_tool(item: Fields) -> str:
    """Return the type of an entry; without one it is a function."""
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
        if kind_of_tool(member) in OURS:
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
    if kind == "mcp":
        return echo_mcp(item)
    if kind == "namespace":
        members = [
            _echo(tool, kind_of_tool(tool)) for tool in item.children("tools", MAX_TOOLS) if kind_of_tool(tool) in OURS
        ]
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

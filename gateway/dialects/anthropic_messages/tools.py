"""Tools and tool choice of Anthropic's dialect → the contract. Above: `request`; below: chat's function reader."""

from __future__ import annotations

from collections.abc import Iterable

from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.anthropic_messages.known_tools import known_tool
from gateway.dialects.openai_chat.tools import MAX_NAME_CHARS, MAX_TOOLS, read_function
from gateway.fields import Fields, show, wrong_type

_OURS = (None, "custom", "function")
_MODES = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "any": pb.TOOL_CHOICE_MODE_REQUIRED,
    "tool": pb.TOOL_CHOICE_MODE_REQUIRED,
    "none": pb.TOOL_CHOICE_MODE_NONE,
}


def parse_tools(body: Fields, changes: Iterable[tuple[bool, Fields]] = ()) -> list[pb.Tool]:
    """Return the tools that the model may call. Tools that only Anthropic hosts are left out.

    Args:
        body: with `tools`.
        changes: what system messages offered (True) or withdrew (False) since, in order.

    Raises:
        InvalidRequest: malformed, or two tools of one name.
    """
    declared: dict[str, pb.Tool] = {}
    for item in body.children("tools", MAX_TOOLS):
        if (tool := _tool(item)) is not None:
            if tool.name in declared:
                raise InvalidRequest(f"Two tools have the name {show(tool.name)}.", param=item.name_of("name"))
            declared[tool.name] = tool
    offered = dict(declared)
    for is_added, what in changes:
        definition = what.child("definition")
        if definition is not None:
            tool = _tool(definition)
            if tool is not None and is_added:
                declared[tool.name] = offered[tool.name] = tool
        elif name := what.string("name", MAX_NAME_CHARS):
            if not is_added:
                offered.pop(name, None)
            elif name in declared:
                offered[name] = declared[name]
    if len(offered) > MAX_TOOLS:
        raise InvalidRequest(f"Invalid 'tools': more than {MAX_TOOLS} tools.", param="tools")
    return list(offered.values())


def _tool(item: Fields) -> pb.Tool | None:
    kind = item.raw("type")
    if kind in _OURS:
        return read_function(item)
    if not isinstance(kind, str):
        raise wrong_type(item.name_of("type"), "a string", kind)
    return known_tool(kind, item)


def parse_tool_choice(body: Fields, tools: Iterable[pb.Tool]) -> pb.ToolChoice | None:
    """Return how tools may be used, or None when the request says nothing about it.

    Raises:
        InvalidRequest: a call is demanded of a tool that is not in `tools`, or of none at all.
    """
    choice = body.child("tool_choice")
    if choice is None:
        return None
    kind = choice.choice("type", tuple(_MODES))
    if kind is None:
        raise choice.missing("type")
    made = pb.ToolChoice(mode=_MODES[kind])
    names = {tool.name for tool in tools}
    if kind == "tool":
        name = choice.string("name", MAX_NAME_CHARS)
        if not name:
            raise choice.missing("name")
        if name not in names:
            raise InvalidRequest(f"'tool_choice' names {show(name)}, which is not in 'tools'.", param="tool_choice")
        made.allowed_names.append(name)
        # A named tool is called once.
        made.parallel = False
    elif kind == "any" and not names:
        raise InvalidRequest("'tool_choice' demands a call, but 'tools' is empty.", param="tool_choice")
    if choice.boolean("disable_parallel_tool_use"):
        made.parallel = False
    return made

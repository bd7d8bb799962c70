"""`tool_choice` of a responses request → the contract. Above: `request`; below: `tools`.

Which of an MCP server's tools it names is known only once that server has been asked: `ToolTable.chosen` keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.tools import MAX_NAME_CHARS, MAX_TOOLS, MODES, choice_of_word
from gateway.dialects.openai_responses.tools import OURS, ToolTable, kind_of_tool, model_name
from gateway.fields import Fields, show, wrong_type


def parse_tool_choice(body: Fields, table: ToolTable) -> tuple[pb.ToolChoice | None, ToolTable]:
    """Return how tools may be used, or None when the request says nothing about it; and the table that knows of it.

    Raises:
        InvalidRequest: a call is demanded of a tool that is not in `tools`, or of none at all.
        UnsupportedParameter: a call is demanded of a tool that only OpenAI hosts.
    """
    choice, chosen = _choice(body, table)
    table = replace(table, chosen=chosen)
    parallel = body.boolean("parallel_tool_calls")
    if choice is None and parallel is None:
        return None, table
    choice = choice or pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO)
    if choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED and not table.tools and not table.mcp:
        raise InvalidRequest("'tool_choice' demands a call, but 'tools' is empty.", param="tool_choice")
    if parallel is not None and not choice.HasField("parallel"):
        choice.parallel = parallel
    return choice, table


_Chosen = tuple[tuple[str, str | None], ...]


def _choice(body: Fields, table: ToolTable) -> tuple[pb.ToolChoice | None, _Chosen]:
    value = body.raw("tool_choice")
    if value is None:
        return None, ()
    if isinstance(value, str):
        return choice_of_word(value), ()
    if not isinstance(value, dict):
        raise wrong_type("tool_choice", "a string or an object", value)
    choice = Fields(value, "tool_choice")
    kind = choice.string("type", 64)
    if kind is None:
        raise choice.missing("type")
    if kind == "allowed_tools":
        allowed = choice.child("allowed_tools") or choice
        mode = allowed.choice("mode", ("auto", "required")) or "auto"
        members = allowed.children("tools", MAX_TOOLS)
        chosen = tuple(_chosen(tool, table) for tool in members if kind_of_tool(tool) == "mcp")
        allowed_names = [_named(tool, table) for tool in members if kind_of_tool(tool) in OURS]
        if not allowed_names and not chosen:
            return pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE), ()
        return pb.ToolChoice(mode=MODES[mode], allowed_names=allowed_names), chosen
    # A named tool is called once, whatever parallel_tool_calls says.
    if kind == "mcp":
        return pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED, parallel=False), (_chosen(choice, table),)
    if kind not in OURS:
        raise UnsupportedParameter(
            f"'tool_choice' demands {show(kind)}, which is not served here.", param="tool_choice"
        )
    name = _named(choice, table)
    return pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED, allowed_names=[name], parallel=False), ()


def _chosen(value: Fields, table: ToolTable) -> tuple[str, str | None]:
    label = value.string("server_label", MAX_NAME_CHARS)
    if not label:
        raise value.missing("server_label")
    if all(spec.label != label for spec in table.mcp):
        raise InvalidRequest(
            f"'tool_choice' names the MCP server {show(label)}, which is not in 'tools'.", param="tool_choice"
        )
    return label, value.string("name", MAX_NAME_CHARS)


def _named(value: Fields, table: ToolTable) -> str:
    """Return the model's name for a tool that the client names, with its namespace or, if only one fits, without."""
    inner = value.child(kind_of_tool(value)) or value
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

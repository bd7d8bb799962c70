"""Tools and tool choice of OpenAI's dialect → the contract. Above: `request`; below: `fields`."""

from __future__ import annotations

from collections.abc import Mapping

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.fields import Fields, dump_json, show, wrong_type

MAX_TOOLS = 512
MAX_NAME_CHARS = 128
MAX_DESCRIPTION_CHARS = 64 * 1024
_NO_PARAMETERS = '{"type":"object","properties":{}}'
MODES: Mapping[str, pb.ToolChoiceMode.ValueType] = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}


def parse_tools(body: Fields) -> list[pb.Tool]:
    """Return the tools that the model may call."""
    tools = []
    for tool in body.children("tools", MAX_TOOLS):
        kind = tool.raw("type")
        if kind not in (None, "function"):
            raise UnsupportedParameter(
                f"'{tool.name_of('type')}' {show(kind)} is not supported; only 'function' is.",
                param=tool.name_of("type"),
            )
        function = tool.child("function")
        # Responses' tools are flat, and clients send them here, too.
        if function is None:
            function = tool if tool.raw("name") is not None else tool.required_child("function")
        tools.append(read_function(function))
    return tools


def read_function(function: Fields) -> pb.Tool:
    """Return one function that may be called: `{"name", "description", "parameters", "strict"}`.

    The schema may also be called `input_schema`, as Anthropic's dialect does.
    """
    name = function.string("name", MAX_NAME_CHARS)
    if not name:
        raise function.missing("name")
    field = "parameters" if function.raw("parameters") is not None else "input_schema"
    parameters = function.object(field)
    return pb.Tool(
        name=name,
        description=function.string("description", MAX_DESCRIPTION_CHARS) or "",
        parameters_json=dump_json(parameters, function.name_of(field)) if parameters else _NO_PARAMETERS,
        strict=bool(function.boolean("strict")),
    )


def parse_tool_choice(body: Fields, tools: list[pb.Tool], *, has_more: bool = False) -> pb.ToolChoice | None:
    """Return how tools may be used, or None when the request says nothing about it.

    Args:
        has_more: there will be tools beside these.

    Raises:
        InvalidRequest: a call is demanded of a tool that is not in `tools`, or of none at all.
    """
    choice = _choice(body)
    parallel = body.boolean("parallel_tool_calls")
    if choice is None and parallel is None:
        return None
    choice = choice or pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_AUTO)
    if choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED and not tools and not has_more:
        raise InvalidRequest("'tool_choice' demands a call, but 'tools' is empty.", param="tool_choice")
    unknown = set(choice.allowed_names) - {tool.name for tool in tools}
    if unknown:
        raise InvalidRequest(f"'tool_choice' names {show(min(unknown))}, which is not in 'tools'.", param="tool_choice")
    if parallel is not None and not choice.HasField("parallel"):
        choice.parallel = parallel
    return choice


def choice_of_word(word: str) -> pb.ToolChoice:
    """Return the choice that one word makes: auto, none or required.

    Raises:
        InvalidRequest: another word.
    """
    if word not in MODES:
        names = ", ".join(f"'{name}'" for name in MODES)
        raise InvalidRequest(f"Invalid value: {show(word)}. Supported values are: {names}.", param="tool_choice")
    return pb.ToolChoice(mode=MODES[word])


def _choice(body: Fields) -> pb.ToolChoice | None:
    value = body.raw("tool_choice")
    if value is None:
        return None
    if isinstance(value, str):
        return choice_of_word(value)
    if not isinstance(value, dict):
        raise wrong_type("tool_choice", "a string or an object", value)
    choice = Fields(value, "tool_choice")
    kind = choice.choice("type", ("function", "allowed_tools"))
    if kind == "allowed_tools":
        allowed = choice.child("allowed_tools") or choice
        mode = allowed.choice("mode", ("auto", "required")) or "auto"
        chosen = [_function_name(tool) for tool in allowed.children("tools", MAX_TOOLS)]
        return pb.ToolChoice(mode=MODES[mode], allowed_names=chosen)
    # A named tool is called once, whatever parallel_tool_calls says.
    return pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED, allowed_names=[_function_name(choice)], parallel=False)


def _function_name(value: Fields) -> str:
    name = (value.child("function") or value).string("name", MAX_NAME_CHARS)
    if not name:
        raise value.missing("function.name")
    return name

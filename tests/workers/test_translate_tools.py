"""The contract's words for tools, constraints and reasoning, both ways across the worker's edge."""

from __future__ import annotations

import json

import pytest
from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from workers import translate
from workers.engine import (
    ChatPrompt,
    Constraint,
    Finish,
    ModelFacts,
    ReasoningDelta,
    ReasoningRule,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

ABLE = ModelFacts("m", "text", "A", "float32", 100, supports_tools=True, supports_reasoning=True)
UNABLE = ModelFacts("m", "scripted", "A", "none", 100)
TOOLS = [
    pb.Tool(name="a", description="d", parameters_json='{"type":"object"}', strict=True),
    pb.Tool(name="b", parameters_json="{}"),
]


def chat(**fields: object) -> pb.GenerateRequest:
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="hi")])
    return pb.GenerateRequest(chat=pb.Chat(messages=[message], **fields))  # type: ignore[arg-type]


def test_tools_are_shown_whole_and_offered_as_the_choice_allows() -> None:
    def asked(**choice: object) -> object:
        message = chat(tools=TOOLS, tool_choice=pb.ToolChoice(**choice) if choice else None)  # type: ignore[arg-type]
        request = translate.generation_request(message, ABLE, "r")
        assert isinstance(request.prompt, ChatPrompt)
        use = request.tool_use
        return len(request.prompt.tools), [t.name for t in use.tools], use.required, use.parallel

    required = pb.TOOL_CHOICE_MODE_REQUIRED
    assert asked() == (2, ["a", "b"], False, True)
    assert asked(mode=pb.TOOL_CHOICE_MODE_NONE) == (0, [], False, True)
    assert asked(mode=required, allowed_names=["b"], parallel=False) == (2, ["b"], True, False)
    assert asked(mode=pb.TOOL_CHOICE_MODE_AUTO, allowed_names=["a"]) == (2, ["a"], False, True)
    with pytest.raises(InvalidRequest):
        asked(mode=required, allowed_names=["stranger"])


def test_strictness_and_schemas_reach_the_engine() -> None:
    first, second = translate.generation_request(chat(tools=TOOLS), ABLE, "r").tool_use.tools
    assert (first.strict, first.parameters) == (True, {"type": "object"})
    assert not second.strict
    for bad in ("[1]", "{", "[" * 100_000):
        with pytest.raises(InvalidRequest):
            translate.generation_request(chat(tools=[pb.Tool(name="c", parameters_json=bad)]), ABLE, "r")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (pb.Constraint(json_object=True), Constraint("json_object")),
        (pb.Constraint(json_object=False), None),
        (pb.Constraint(json_schema="{}"), Constraint("json_schema", "{}")),
        (pb.Constraint(regex="a+"), Constraint("regex", "a+")),
        (pb.Constraint(grammar="start: /a/"), Constraint("lark", "start: /a/")),
        (pb.Constraint(), None),
    ],
)
def test_each_kind_of_constraint_has_its_word(message: pb.Constraint, expected: Constraint | None) -> None:
    request = chat()
    request.constraint.CopyFrom(message)
    assert translate.generation_request(request, ABLE, "r").constraint == expected


def test_reasoning_becomes_template_variables_and_a_rule() -> None:
    wish = pb.Reasoning(enabled=False, effort="low", budget_tokens=7)
    request = translate.generation_request(chat(reasoning=wish, template_kwargs_json='{"thinking":true}'), ABLE, "r")
    assert request.reasoning == ReasoningRule(False, 7)
    assert isinstance(request.prompt, ChatPrompt)
    # What the caller says of a variable by name wins.
    assert request.prompt.template_kwargs == {"thinking": True, "enable_thinking": False, "reasoning_effort": "low"}


def test_an_engine_without_structure_or_tools_refuses_them_by_name() -> None:
    constrained = chat()
    constrained.constraint.json_object = True
    for message, param in ((constrained, "response_format"), (chat(tools=TOOLS), "tools")):
        with pytest.raises(UnsupportedParameter) as refused:
            translate.generation_request(message, UNABLE, "r")
        assert refused.value.param == param


def test_every_event_of_a_call_crosses_the_wire() -> None:
    events = [
        ReasoningDelta("hm"),
        ToolCallStart(1, "call_1", "a"),
        ToolCallArguments(1, '{"x'),
        ToolCallEnd(1),
        Finish("tool_calls", 3, 9, num_reasoning_tokens=4),
    ]
    sent = [translate.event(event) for event in events]
    assert [m.WhichOneof("event") for m in sent] == [
        "reasoning",
        "tool_call_start",
        "tool_call_arguments",
        "tool_call_end",
        "finish",
    ]
    start = sent[1].tool_call_start
    assert (start.id, start.name, start.index) == ("call_1", "a", 1)
    assert sent[2].tool_call_arguments.json_fragment == '{"x'
    assert sent[4].finish.reason == pb.FINISH_REASON_TOOL_CALLS
    assert sent[4].finish.usage.num_reasoning_tokens == 4


def test_arguments_reach_the_template_as_an_object_where_they_are_one() -> None:
    call = pb.ToolCall(id="1", name="a", arguments_json='{"x": [1]}')
    broken = pb.ToolCall(id="2", name="a", arguments_json='{"x')
    message = pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[call, broken])
    prompt = translate.chat_prompt(pb.Chat(messages=[message]))
    calls = json.loads(json.dumps(prompt.messages[0]["tool_calls"]))
    assert [c["function"]["arguments"] for c in calls] == [{"x": [1]}, '{"x']

"""The responses dialect as pure functions: worker events in, the response's events and object out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hostler.errors import ContextLengthExceeded
from hostler.inference.v1 import inference_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.openai_responses.builder import ResponseBuilder
from gateway.dialects.openai_responses.custom_input import CustomInput
from gateway.dialects.openai_responses.reasoning_text import unsealed
from gateway.dialects.openai_responses.request import ResponsesRequest
from gateway.dialects.openai_responses.response_object import in_this_dialect, new_response
from gateway.dialects.openai_responses.tools import ToolTable
from tests.gateway.fakes import finish, text
from tests.gateway.responses_schema import check_events, check_response
from tests.gateway.test_responses_requests import DEMO, ECHO, PATCH, parse


def start(index: int, name: str, call_id: str = "") -> pb.GenerateResponse:
    return pb.GenerateResponse(tool_call_start=pb.ToolCallStart(index=index, id=call_id, name=name))


def arguments(index: int, fragment: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(tool_call_arguments=pb.ToolCallArguments(index=index, json_fragment=fragment))


def end(index: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(tool_call_end=pb.ToolCallEnd(index=index))


def reasoning(value: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(reasoning=pb.ReasoningDelta(text=value))


def build(*events: pb.GenerateResponse, request: ResponsesRequest | None = None) -> list[dict[str, Any]]:
    request = request or parse(tools=[ECHO, PATCH, DEMO])
    response = new_response(
        response_id="resp_1", created_unix_s=1, model="m", status="in_progress", store=True, echo=request.echo
    )
    builder = ResponseBuilder(
        response,
        request.tools,
        wants_logprobs=request.wants_logprobs,
        as_summary=request.wants_summary,
        with_seal=request.wants_sealed,
    )
    made = builder.open()
    for event in events:
        made += builder.add(event)
    check_events(made)
    return made


WORKER_EVENTS = st.one_of(
    st.builds(text, st.text(max_size=3)),
    st.builds(reasoning, st.text(max_size=3)),
    st.builds(start, st.integers(0, 2), st.sampled_from(["echo", "apply_patch", "mcp__demo__echo", "unheard_of"])),
    st.builds(arguments, st.integers(0, 2), st.sampled_from(["{}", '{"input": "', "a\\", '"}', "é"])),
    st.builds(end, st.integers(0, 2)),
)
REASONS = st.sampled_from([pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_TOOL_CALLS])


@given(st.lists(WORKER_EVENTS, max_size=12), REASONS)
def test_whatever_a_worker_sends_becomes_a_valid_stream(events: list[pb.GenerateResponse], reason: Any) -> None:
    made = build(*events, finish(3, reason))
    told = "".join(event.text.text for event in events)
    output = made[-1]["response"]["output"]
    assert "".join(item["content"][0]["text"] for item in output if item["type"] == "message") == told
    num_calls = sum(event.HasField("tool_call_start") for event in events)
    assert sum(item["type"].endswith("_call") for item in output) == num_calls


def test_a_text_has_all_events_in_order() -> None:
    events = build(text("a"), text("b"), finish(2))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[-1]["response"]["usage"]["total_tokens"] == 7
    assert events[-1]["response"]["completed_at"] is not None


def test_reasoning_text_and_calls_are_items_of_their_own_in_the_order_they_came() -> None:
    events = build(
        reasoning("let "),
        reasoning("me"),
        text("I look"),
        start(0, "echo", "call_a"),
        arguments(0, '{"x":'),
        start(1, "mcp__demo__echo"),
        arguments(0, "1}"),
        end(0),
        arguments(1, "{}"),
        end(1),
        start(2, "apply_patch", "call_c"),
        arguments(2, '{"input": "a\\n'),
        arguments(2, 'b"}'),
        end(2),
        text("done"),
        finish(9, pb.FINISH_REASON_TOOL_CALLS),
    )
    output = events[-1]["response"]["output"]
    kinds = ["reasoning", "message", "function_call", "function_call", "custom_tool_call", "message"]
    assert [item["type"] for item in output] == kinds
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "let me"}]
    assert (output[2]["name"], output[2]["call_id"], output[2]["arguments"]) == ("echo", "call_a", '{"x":1}')
    assert "namespace" not in output[2]
    assert (output[3]["name"], output[3]["namespace"]) == ("echo", "mcp__demo")
    assert output[3]["call_id"].startswith("call_")
    assert (output[4]["input"], output[4]["call_id"]) == ("a\nb", "call_c")
    assert len({item["id"] for item in output}) == 6


def test_a_summary_and_the_seal_are_given_when_asked_for() -> None:
    asked = parse(reasoning={"summary": "auto"}, include=["reasoning.encrypted_content"])
    events = build(reasoning("hm"), text("x"), finish(2), request=asked)
    item = events[-1]["response"]["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert "content" not in item
    assert unsealed(item["encrypted_content"]) == "hm"
    assert "response.reasoning_summary_text.delta" in {event["type"] for event in events}
    plain = build(reasoning("hm"), text("x"), finish(2))[-1]["response"]["output"][0]
    assert "encrypted_content" not in plain


def test_what_is_cut_off_is_incomplete_and_says_why() -> None:
    events = build(start(0, "echo"), arguments(0, '{"x"'), finish(3, pb.FINISH_REASON_LENGTH))
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete"
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"
    cut = build(reasoning("hm"), text("x"), finish(3, pb.FINISH_REASON_LENGTH))[-1]["response"]["output"]
    assert [item["status"] for item in cut] == ["completed", "incomplete"]
    filtered = build(text("x"), finish(3, pb.FINISH_REASON_CONTENT_FILTER))[-1]["response"]
    assert filtered["incomplete_details"] == {"reason": "content_filter"}


def test_an_empty_reply_is_still_a_message() -> None:
    output = build(finish(0))[-1]["response"]["output"]
    assert output[0]["content"][0]["text"] == ""


def test_logprobs_stand_in_deltas_and_in_the_whole() -> None:
    token = pb.TokenLogprob(token=b"a", logprob=-0.5, top=[pb.TokenLogprob(token=b"b", logprob=-1)])
    event = pb.GenerateResponse(text=pb.TextDelta(text="a", logprobs=[token]))
    asked = parse(include=["message.output_text.logprobs"], top_logprobs=1)
    events = build(event, finish(1), request=asked)
    delta = next(event for event in events if event["type"] == "response.output_text.delta")
    assert delta["logprobs"][0]["top_logprobs"][0]["token"] == "b"
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == delta["logprobs"]
    unasked = build(event, finish(1))[-1]["response"]["output"][0]["content"][0]
    assert unasked["logprobs"] == []


def test_a_failure_ends_with_response_failed_and_speaks_of_this_dialects_fields() -> None:
    request = parse()
    response = new_response(
        response_id="resp_1", created_unix_s=1, model="m", status="in_progress", store=True, echo=request.echo
    )
    builder = ResponseBuilder(response, ToolTable())
    error = in_this_dialect(ContextLengthExceeded("too long", param="messages"))
    events = builder.fail(error)
    check_events(events)
    kinds = [event["type"] for event in events]
    assert kinds == ["response.created", "response.in_progress", "error", "response.failed"]
    assert events[-1]["response"]["error"]["message"] == "too long"
    assert events[-1]["response"]["error"]["param"] == events[2]["param"] == "input"
    assert events[2]["code"] == "context_length_exceeded"


def test_the_object_repeats_the_request() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    request = parse(
        tools=[ECHO, PATCH, DEMO, {"type": "web_search"}, {"type": "function", "name": "bare"}],
        tool_choice={"type": "function", "function": {"name": "echo"}},
        metadata={"a": "b"},
        temperature=0.5,
        instructions="x",
        parallel_tool_calls=False,
        text={"format": schema},
        max_output_tokens=5,
        safety_identifier="s",
        conversation="conv_1",
    )
    response = check_response(build(text("x"), finish(1), request=request)[-1]["response"])
    assert [tool["type"] for tool in response["tools"]] == ["function", "custom", "namespace", "function"]
    assert response["tool_choice"] == {"type": "function", "name": "echo"}
    assert response["text"]["format"]["strict"] is True
    assert (response["metadata"], response["temperature"], response["instructions"]) == ({"a": "b"}, 0.5, "x")
    assert response["conversation"] == {"id": "conv_1"}


@given(st.text(), st.lists(st.integers(0, 400), max_size=8), st.booleans())
def test_a_custom_tools_text_is_the_same_however_its_json_is_cut(value: str, cuts: list[int], ascii_only: bool) -> None:
    raw = json.dumps({"input": value}, ensure_ascii=ascii_only)
    decoder, pieces, begin = CustomInput(), [], 0
    for cut in (*sorted(cuts), len(raw)):
        pieces.append(decoder.feed(raw[begin:cut]))
        begin = max(begin, min(cut, len(raw)))
    whole, rest = decoder.finish()
    assert whole == "".join(pieces) + rest == value


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("", ""),
        ("{}", ""),
        ('{"other": 1}', '{"other": 1}'),
        ('{"x": 1, "input": "t"}', "t"),
        ("no json", "no json"),
        ('{"input": "cut \\', "cut "),
        ('{"input": "lone \\ud83d x"}', "lone � x"),
    ],
)
def test_nothing_that_a_model_wrote_for_a_custom_tool_is_lost(raw: str, expected: str) -> None:
    decoder = CustomInput()
    told = decoder.feed(raw)
    whole, rest = decoder.finish()
    assert whole == told + rest == expected

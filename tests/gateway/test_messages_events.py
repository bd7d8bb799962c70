"""Anthropic's dialect as pure functions: worker events in, the message and its events out."""

from __future__ import annotations

from typing import Any

import pytest
from hostler.errors import (
    ContextLengthExceeded,
    HostlerError,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMedia,
    WorkerLost,
)
from hostler.inference.v1 import inference_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.anthropic_messages.builder import MessageBuilder
from gateway.dialects.anthropic_messages.errors import error_body
from gateway.dialects.anthropic_messages.request import Thoughts
from gateway.dialects.openai_responses.reasoning_text import unsealed
from tests.gateway.fakes import finish, text
from tests.gateway.messages_schema import check_error, check_events, check_message
from tests.gateway.test_responses_events import REASONS, arguments, end, reasoning, start


def build(
    *events: pb.GenerateResponse, thoughts: Thoughts = Thoughts.SHOWN, max_tokens: int | None = 3
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the events and the whole; the client makes the same of both."""
    builder = MessageBuilder(message_id="msg_1", model="m", thoughts=thoughts, max_tokens=max_tokens)
    made = builder.open(pb.Usage(num_prompt_tokens=7, num_cached_tokens=2))
    for event in events:
        made += builder.add(event)
    whole = check_message(builder.message())
    assert check_events(made) == whole
    return made, whole


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


WORKER_EVENTS = st.one_of(
    st.builds(text, st.text(max_size=3)),
    st.builds(reasoning, st.text(max_size=3)),
    st.builds(start, st.integers(0, 2), st.sampled_from(["echo", "look"])),
    # Pieces that make an object, wherever they are cut.
    st.builds(
        arguments,
        st.integers(0, 2),
        st.sampled_from(['{"x": 1, "y": ["é', "{", "", '{"a": {"b": null']),
    ),
    st.builds(end, st.integers(0, 2)),
)


def as_valid_calls(events: list[pb.GenerateResponse]) -> list[pb.GenerateResponse]:
    """Drop second pieces of arguments: a worker's pieces of one call are a prefix of valid JSON."""
    begun: set[int] = set()
    kept = []
    for event in events:
        if event.HasField("tool_call_start"):
            begun.discard(event.tool_call_start.index)
        if event.HasField("tool_call_arguments"):
            if event.tool_call_arguments.index in begun:
                continue
            begun.add(event.tool_call_arguments.index)
        kept.append(event)
    return kept


@given(st.lists(WORKER_EVENTS, max_size=12), REASONS, st.sampled_from(Thoughts))
def test_whatever_a_worker_sends_becomes_a_valid_stream_and_the_same_message(
    events: list[pb.GenerateResponse], reason: Any, thoughts: Thoughts
) -> None:
    events = as_valid_calls(events)
    _, whole = build(*events, finish(3, reason), thoughts=thoughts)
    told = "".join(event.text.text for event in events)
    assert "".join(block["text"] for block in whole["content"] if block["type"] == "text") == told
    num_calls = sum(event.HasField("tool_call_start") for event in events)
    assert sum(block["type"] == "tool_use" for block in whole["content"]) == num_calls


def test_a_text_has_all_events_in_order() -> None:
    events, whole = build(text("a"), text("b"), finish(2))
    assert kinds(events) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert whole["content"] == [{"type": "text", "text": "ab"}]
    assert (whole["id"], whole["role"], whole["model"], whole["stop_reason"]) == ("msg_1", "assistant", "m", "end_turn")


def test_every_piece_of_text_leaves_at_once() -> None:
    builder = MessageBuilder(message_id="msg_1", model="m", thoughts=Thoughts.SHOWN, max_tokens=9)
    assert kinds(builder.add(text("a"))) == ["content_block_start", "content_block_delta"]
    assert kinds(builder.add(text("b"))) == ["content_block_delta"]
    assert kinds(builder.add(start(0, "echo"))) == ["content_block_stop", "content_block_start"]
    assert kinds(builder.add(arguments(0, "{"))) == ["content_block_delta"]
    assert kinds(builder.add(end(0))) == ["content_block_stop"]


def test_thoughts_text_and_calls_are_blocks_of_their_own() -> None:
    events, whole = build(
        reasoning("let "),
        reasoning("me"),
        text("Looking."),
        start(0, "look", "call_a"),
        arguments(0, '{"x":'),
        arguments(0, "1}"),
        end(0),
        start(1, "look"),
        end(1),
        finish(3, pb.FINISH_REASON_TOOL_CALLS),
    )
    thinking, said, first, second = whole["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "let me")
    assert thinking["signature"]
    assert said == {"type": "text", "text": "Looking."}
    assert first == {"type": "tool_use", "id": "call_a", "name": "look", "input": {"x": 1}}
    assert (second["input"], second["id"].startswith("toolu_")) == ({}, True)
    assert whole["stop_reason"] == "tool_use"
    pieces = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert pieces == ['{"x":', "1}"]


def test_calls_that_grow_side_by_side_are_told_one_after_the_other() -> None:
    _, whole = build(
        start(0, "a", "1"),
        start(1, "b", "2"),
        arguments(1, '{"b"'),
        arguments(0, '{"a": 0}'),
        arguments(1, ": 1}"),
        text("after"),
        end(1),
        end(0),
        finish(3),
    )
    assert [block.get("input") for block in whole["content"]] == [{"a": 0}, {"b": 1}, None]
    assert whole["content"][2]["text"] == "after"


def test_thoughts_that_are_omitted_travel_in_the_signature() -> None:
    events, whole = build(reasoning("a b"), reasoning("c"), text("x"), finish(2), thoughts=Thoughts.OMITTED)
    assert whole["content"][0]["thinking"] == ""
    assert unsealed(whole["content"][0]["signature"]) == "a bc"
    assert "thinking_delta" not in {event.get("delta", {}).get("type") for event in events}


def test_thoughts_that_nobody_asked_for_are_left_out() -> None:
    _, whole = build(reasoning("hm"), text("a"), reasoning("hm"), text("b"), finish(4), thoughts=Thoughts.UNASKED)
    assert whole["content"] == [{"type": "text", "text": "ab"}]


@pytest.mark.parametrize(
    ("reason", "stop", "max_tokens", "expected"),
    [
        (pb.FINISH_REASON_STOP, "", 9, "end_turn"),
        (pb.FINISH_REASON_STOP, "END", 9, "stop_sequence"),
        (pb.FINISH_REASON_LENGTH, "", 3, "max_tokens"),
        (pb.FINISH_REASON_LENGTH, "", 9, "model_context_window_exceeded"),
        (pb.FINISH_REASON_TOOL_CALLS, "", 9, "tool_use"),
        (pb.FINISH_REASON_CONTENT_FILTER, "", 9, "refusal"),
    ],
)
def test_why_a_reply_ended_is_told_in_this_dialects_words(
    reason: pb.FinishReason, stop: str, max_tokens: int, expected: str
) -> None:
    last = finish(3, reason)
    last.finish.stop = stop
    _, whole = build(text("x"), last, max_tokens=max_tokens)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (expected, stop or None)


def test_of_a_call_that_was_cut_off_what_was_complete_stays() -> None:
    _, whole = build(start(0, "a", "1"), arguments(0, '{"x": [1, 2], "y": "ab'), finish(3, pb.FINISH_REASON_LENGTH))
    assert whole["content"][0]["input"] == {"x": [1, 2]}
    assert whole["stop_reason"] == "max_tokens"


def test_the_input_is_counted_at_the_beginning_and_cached_tokens_apart() -> None:
    last = finish(4, prompt=7)
    last.finish.usage.num_cached_tokens = 2
    last.finish.usage.num_reasoning_tokens = 1
    events, whole = build(text("x"), last)
    begun = events[0]["message"]["usage"]
    assert (begun["input_tokens"], begun["cache_read_input_tokens"], begun["output_tokens"]) == (5, 2, 0)
    assert begun["cache_creation_input_tokens"] == 0
    usage = whole["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (5, 2, 4)
    assert usage["output_tokens_details"] == {"thinking_tokens": 1}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequest("Bad.", param="messages[0].content[1].type"), "messages.0.content.1.type: Bad."),
        (InvalidRequest("'model' is bad.", param="model"), "'model' is bad."),
        (InvalidRequest("Bad.", param="response_format"), "output_config.format: Bad."),
        (ContextLengthExceeded("9 of 8.", param="messages"), "prompt is too long: 9 of 8."),
        (ContextLengthExceeded("x").counted(9, 8), "prompt is too long: 9 tokens > 8 maximum"),
        (PayloadTooLarge("Big."), "Big."),
        (UnsupportedMedia("What?"), "What?"),
        (Overloaded("Later."), "Later."),
        (WorkerLost("Gone."), "Gone."),
    ],
)
def test_errors_have_this_dialects_types_and_name_the_field_in_their_message(
    error: HostlerError, expected: str
) -> None:
    assert check_error(error_body(error, "req_1"), error.http_status) == expected

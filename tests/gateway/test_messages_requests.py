"""Anthropic's dialect as pure functions: requests in, the contract out."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.anthropic_messages.request import (
    MessagesRequest,
    Thoughts,
    parse_count_request,
    parse_messages_request,
)
from gateway.dialects.openai_responses.reasoning_text import sealed
from gateway.links import Link

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\nrest").decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
LINKED = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
LOOK = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "b": 1, "a": 2}}
USE = {"type": "tool_use", "id": "t1", "name": "look", "input": {"b": 1, "a": 2}}
USER = {"role": "user", "content": "hi"}


def parse(messages: Any = "hi", **fields: Any) -> MessagesRequest:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return parse_messages_request({"model": "m", "max_tokens": 9, "messages": messages, **fields})


def sent(messages: Any = "hi", **fields: Any) -> pb.GenerateRequest:
    return parse(messages, **fields).chat.generate


def told(messages: Any = "hi", **fields: Any) -> list[tuple[str, str]]:
    found = sent(messages, **fields).chat.messages
    return [(pb.Role.Name(m.role).removeprefix("ROLE_"), "".join(part.text for part in m.parts)) for m in found]


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def result(content: Any, call_id: str = "t1", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


def test_content_is_a_text_or_blocks_and_turns_of_one_role_are_one() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [text("b", cache_control={"type": "ephemeral"}), text("c")]},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": [text("e")]},
        {"role": "user", "content": "f"},
    ]
    assert told(messages) == [("USER", "a\n\nb\nc"), ("ASSISTANT", "de"), ("USER", "f")]


@pytest.mark.parametrize("system", ["be kind", [text("be kind", cache_control={"type": "ephemeral"})]])
def test_what_the_system_says_before_the_first_answer_opens_the_conversation(system: Any) -> None:
    messages = [
        USER,
        {"role": "system", "content": [text("the year is 2026")]},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "bye"},
        {"role": "system", "content": "be quick"},
    ]
    assert told(messages, system=system) == [
        ("SYSTEM", "be kind\n\nthe year is 2026"),
        ("USER", "hi"),
        ("ASSISTANT", "yes?"),
        ("USER", "bye"),
        ("SYSTEM", "be quick"),
    ]


def test_lines_for_anthropics_accounting_do_not_reach_the_model() -> None:
    system = [text("x-anthropic-billing-header: cc_version=1.2.3;"), text("be kind")]
    assert told(system=system)[0] == ("SYSTEM", "be kind")
    assert told(system=system[:1]) == [("USER", "hi")]


def test_a_system_message_of_one_turn_is_gone_in_the_next() -> None:
    note = {"role": "system", "content": "now", "clear_at": "next_user_message"}
    answered = [USER, note, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert told([USER, note]) == [("SYSTEM", "now"), ("USER", "hi")]
    assert told(answered) == [("USER", "hi"), ("ASSISTANT", "a"), ("USER", "b")]


def test_an_assistants_blocks_are_one_message() -> None:
    messages = [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "secret"},
                text("let me look"),
                {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
                {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
                USE,
                {"type": "tool_use", "id": "t2", "name": "echo", "input": {}},
            ],
        },
        {"role": "user", "content": [text("and?"), result("rain"), result([text("x"), text("y")], "t2")]},
    ]
    _, turn, first, second, user = sent(messages).chat.messages
    assert (turn.reasoning, turn.parts[0].text) == ("hm", "let me look")
    assert [(c.id, c.name, c.arguments_json) for c in turn.tool_calls] == [
        ("t1", "look", '{"b":1,"a":2}'),
        ("t2", "echo", "{}"),
    ]
    # Results come first, whatever stood before them: templates want them right after the calls.
    assert (first.role, first.tool_call_id, first.name) == (pb.ROLE_TOOL, "t1", "look")
    assert ("".join(p.text for p in second.parts), second.tool_call_id, second.name) == ("x\ny", "t2", "echo")
    assert (user.role, user.parts[0].text) == (pb.ROLE_USER, "and?")


def test_thoughts_that_were_omitted_come_back_from_their_signature() -> None:
    for block in (
        {"type": "thinking", "thinking": "", "signature": sealed("deep")},
        {"type": "thinking", "thinking": "deep", "signature": sealed("")},
    ):
        turn = {"role": "assistant", "content": [block, text("a")]}
        assert sent([USER, turn, USER]).chat.messages[1].reasoning == "deep"
    elsewhere = {"type": "thinking", "thinking": "", "signature": "EqQBCgIYAhIM"}
    assert sent([USER, {"role": "assistant", "content": [elsewhere, text("a")]}, USER]).chat.messages[1].reasoning == ""


def test_a_failed_tool_says_so_and_its_images_follow_in_the_users_message() -> None:
    content = [text("before"), IMAGE, text("after")]
    messages = [
        USER,
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [LINKED, result(content, is_error=True), text("what is it?")]},
    ]
    *_, tool, user = sent(messages).chat.messages
    assert [part.text for part in tool.parts] == ["Error: before\nafter"]
    assert [part.WhichOneof("part") for part in user.parts] == ["image", "image", "text"]
    assert (user.parts[0].image.data, user.parts[0].image.mime_type) == (base64.b64decode(PNG), "image/png")
    silent = [USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [result(None)]}]
    assert list(sent(silent).chat.messages[-1].parts) == []


def test_images_by_address_are_links_in_the_order_of_their_parts() -> None:
    other = {"type": "image", "source": {"type": "url", "url": "https://example.org/b.png"}}
    messages = [
        USER,
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [LINKED, result([other])]},
    ]
    chat = parse(messages).chat
    assert chat.links == (
        Link("https://example.org/b.png", "messages[2].content[1].content[0].source.url"),
        Link("https://example.org/a.png", "messages[2].content[0].source.url"),
    )
    assert chat.media == {"image": "messages[2].content[1].content[0]"}


def test_documents_of_text_and_search_results_are_read_in_place() -> None:
    blocks = [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "body"}, "title": "T"},
        {"type": "document", "source": {"type": "content", "content": [text("part")]}, "context": "C"},
        {"type": "document", "source": {"type": "content", "content": "whole"}},
        {"type": "search_result", "source": "https://x", "title": "Hit", "content": [text("found")]},
    ]
    assert told([{"role": "user", "content": blocks}]) == [
        ("USER", "T\nbody\nC\npart\nwhole\nHit\nhttps://x\nfound"),
    ]


def test_the_beginning_of_an_answer_is_continued() -> None:
    begun = sent([USER, {"role": "assistant", "content": "The answer is ("}])
    assert begun.chat.continue_final_message
    assert not sent([USER, {"role": "assistant", "content": ""}]).chat.continue_final_message
    assert not sent().chat.continue_final_message
    noted = [USER, {"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}]
    assert not sent(noted).chat.continue_final_message


def test_tools_come_without_a_type_or_as_custom_and_hosted_ones_are_left_out() -> None:
    tools = [
        LOOK,
        {"type": "custom", "name": "bare", "input_schema": {"type": "object"}, "strict": True, "defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "code_execution_20260120", "name": "code_execution"},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
    ]
    made = sent(tools=tools).chat.tools
    assert [(tool.name, tool.strict) for tool in made] == [("look", False), ("bare", True)]
    assert (made[0].description, made[0].parameters_json) == ("Looks.", '{"type":"object","b":1,"a":2}')


def test_tools_that_anthropic_defined_and_clients_run_are_spelled_out() -> None:
    tools = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool", "max_characters": 100},
        {"type": "memory_20250818", "name": "memory"},
    ]
    made = sent(tools=tools).chat.tools
    assert [tool.name for tool in made] == ["bash", "str_replace_based_edit_tool", "memory"]
    assert '"command"' in made[0].parameters_json
    assert '"old_str"' in made[1].parameters_json


def test_tools_are_offered_and_withdrawn_in_the_middle_of_a_conversation() -> None:
    def change(kind: str, tool: dict[str, Any]) -> dict[str, Any]:
        return {"role": "system", "content": [{"type": kind, "tool": tool}]}

    look, bare = {"type": "tool_reference", "name": "look"}, {"type": "tool_reference", "name": "bare"}
    defined = {"type": "tool_definition", "definition": {**LOOK, "name": "late"}}
    messages = [USER, change("tool_removal", look), change("tool_removal", bare), change("tool_addition", defined)]
    tools = [LOOK, {**LOOK, "name": "bare"}]
    assert [t.name for t in sent([*messages, change("tool_addition", look)], tools=tools).chat.tools] == [
        "late",
        "look",
    ]
    assert told(messages, tools=tools) == [("USER", "hi")]


@pytest.mark.parametrize(
    ("choice", "mode", "names", "parallel"),
    [
        ({"type": "auto"}, pb.TOOL_CHOICE_MODE_AUTO, [], None),
        ({"type": "auto", "disable_parallel_tool_use": True}, pb.TOOL_CHOICE_MODE_AUTO, [], False),
        ({"type": "any"}, pb.TOOL_CHOICE_MODE_REQUIRED, [], None),
        ({"type": "tool", "name": "look"}, pb.TOOL_CHOICE_MODE_REQUIRED, ["look"], False),
        ({"type": "none"}, pb.TOOL_CHOICE_MODE_NONE, [], None),
    ],
)
def test_a_tool_choice_has_a_mode_names_and_whether_calls_may_be_many(
    choice: dict[str, Any], mode: int, names: list[str], parallel: bool | None
) -> None:
    request = parse(tools=[LOOK], tool_choice=choice)
    made = request.chat.generate.chat.tool_choice
    assert (made.mode, list(made.allowed_names)) == (mode, names)
    assert (made.parallel if made.HasField("parallel") else None) is parallel
    assert request.chat.forces_tools == (mode == pb.TOOL_CHOICE_MODE_REQUIRED)


@pytest.mark.parametrize(
    ("fields", "enabled", "budget", "effort", "thoughts"),
    [
        ({}, False, None, "", Thoughts.UNASKED),
        ({"thinking": {"type": "disabled"}}, False, None, "", Thoughts.UNASKED),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, True, 2000, "", Thoughts.SHOWN),
        ({"thinking": {"type": "adaptive"}}, None, None, "", Thoughts.SHOWN),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, None, None, "", Thoughts.OMITTED),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, None, None, "low", Thoughts.SHOWN),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, None, None, "high", Thoughts.SHOWN),
    ],
)
def test_thinking_is_off_unless_asked_for(
    fields: dict[str, Any], enabled: bool | None, budget: int | None, effort: str, thoughts: Thoughts
) -> None:
    request = parse(**fields)
    made = request.chat.generate.chat.reasoning
    assert (made.enabled if made.HasField("enabled") else None) is enabled
    assert (made.budget_tokens if made.HasField("budget_tokens") else None) == budget
    assert (made.effort, request.thoughts) == (effort, thoughts)


def test_the_newest_turn_may_have_an_effort_of_its_own() -> None:
    note = {"role": "system", "content": [], "output_config": {"effort": "low"}}
    fields: dict[str, Any] = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
    assert sent([USER, note], **fields).chat.reasoning.effort == "low"
    assert sent([USER, note, USER], **fields).chat.reasoning.effort == "high"


def test_sampling_stops_terms_and_structured_output_are_carried_over() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    made = sent(
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        seed=7,
        stop_sequences=["END", "\n\n"],
        service_tier="standard_only",
        keep_alive=60,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert (made.sampling.temperature, made.sampling.top_k, made.sampling.seed) == (0.5, 4, 7)
    assert made.sampling.top_p == pytest.approx(0.9)
    assert (list(made.stop), made.max_tokens, made.keep_alive_ms, made.batch) == (["END", "\n\n"], 9, 60_000, False)
    assert made.constraint.json_schema == '{"type":"object","properties":{"b":{},"a":{}}}'
    old = sent(output_format={"type": "json_schema", "schema": schema})
    assert old.constraint == made.constraint
    assert sent(max_tokens=0).max_tokens == 0
    assert sent(max_tokens=0).HasField("max_tokens")


def test_what_changes_no_answer_here_is_ignored() -> None:
    harmless = {
        "metadata": {"user_id": "u"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "cache_control": {"type": "ephemeral"},
        "container": None,
        "inference_geo": "eu",
        "speed": "standard",
        "mcp_servers": [],
        "never_heard_of": {"x": 1},
    }
    assert sent(**harmless) == sent()


def test_a_request_to_count_needs_no_max_tokens() -> None:
    made = parse_count_request({"model": "m", "messages": [USER], "system": "s", "tools": [LOOK]})
    assert made.max_tokens is None
    assert not made.chat.generate.HasField("max_tokens")
    assert made.chat.generate.chat == sent(system="s", tools=[LOOK]).chat

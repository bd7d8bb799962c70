"""The responses dialect as pure functions: requests in, the contract out; Cursor's mixtures on chat's path."""

from __future__ import annotations

import base64
import json
from typing import Any

import orjson
import pytest
from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.request import ChatRequest
from gateway.dialects.openai_responses.as_chat import is_foreign, parse_as_chat
from gateway.dialects.openai_responses.reasoning_text import sealed, unsealed
from gateway.dialects.openai_responses.request import ResponsesRequest, parse_responses_request
from gateway.links import Link

ECHO = {"type": "function", "name": "echo", "parameters": {"type": "object", "b": 1, "a": 2}, "strict": True}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Patch.", "format": {"type": "text"}}
# As deep as can be read, but not written again within an object.
NESTED: dict[str, Any] = {"type": "function", "name": "echo", "x": orjson.loads("[" * 245 + "]" * 245)}
DEMO = {"type": "namespace", "name": "mcp__demo", "description": "A demo.", "tools": [ECHO]}


def parse(input: Any = "hi", **fields: Any) -> ResponsesRequest:
    return parse_responses_request({"model": "m", "input": input, **fields})


def chat(input: Any = "hi", **fields: Any) -> ChatRequest:
    request = parse(input, **fields)
    return request.with_items([], request.items)


def messages(input: Any, **fields: Any) -> list[pb.Message]:
    return list(chat(input, **fields).generate.chat.messages)


def texts(input: Any, **fields: Any) -> list[tuple[str, str]]:
    found = messages(input, **fields)
    return [(pb.Role.Name(m.role).removeprefix("ROLE_"), "".join(part.text for part in m.parts)) for m in found]


def test_an_input_is_a_text_or_messages_with_or_without_a_type() -> None:
    assert texts("hello") == [("USER", "hello")]
    assert texts(
        [
            {"role": "user", "content": "a"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
            {"role": "user", "content": [{"type": "input_text", "text": "c"}, {"type": "text", "text": "d"}]},
            "e",
        ]
    ) == [("USER", "a"), ("ASSISTANT", "b"), ("USER", "cd"), ("USER", "e")]


def test_instructions_and_the_developers_opening_are_one_system_message() -> None:
    items = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "a"},
        {"role": "developer", "content": "later"},
    ]
    assert texts(items, instructions="be brief") == [
        ("SYSTEM", "be brief\n\nbe kind"),
        ("USER", "a"),
        ("DEVELOPER", "later"),
    ]
    assert texts(items[1:2], instructions="x") == [("SYSTEM", "x"), ("USER", "a")]


def test_the_items_of_one_turn_are_one_message_of_the_assistant() -> None:
    turn = messages(
        [
            {"role": "user", "content": "weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": "let me look"},
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"b": 1}'},
            {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": 'say "x"'},
            {"type": "function_call", "call_id": "c3", "name": "echo", "namespace": "mcp__demo", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "ok"}]},
            {"role": "assistant", "content": "it rains"},
            {"role": "assistant", "content": "bye"},
        ]
    )
    assert [pb.Role.Name(m.role) for m in turn] == [
        "ROLE_USER",
        "ROLE_ASSISTANT",
        "ROLE_TOOL",
        "ROLE_TOOL",
        "ROLE_ASSISTANT",
        "ROLE_ASSISTANT",
    ]
    assert turn[1].reasoning == "hm"
    assert turn[1].parts[0].text == "let me look"
    assert [(c.id, c.name) for c in turn[1].tool_calls] == [("c1", "look"), ("c2", "patch"), ("c3", "mcp__demo__echo")]
    assert json.loads(turn[1].tool_calls[1].arguments_json) == {"input": 'say "x"'}
    assert (turn[2].tool_call_id, turn[2].name, turn[2].parts[0].text) == ("c1", "look", "rain")
    assert (turn[3].tool_call_id, turn[3].name, turn[3].parts[0].text) == ("c2", "patch", "ok")


def test_reasoning_comes_back_in_the_clear_sealed_or_as_a_summary() -> None:
    def reasoning(**fields: Any) -> str:
        return messages([{"type": "reasoning", **fields}, {"role": "assistant", "content": "x"}])[0].reasoning

    assert unsealed(sealed("ein Gedanke é\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"))) != ""
    assert reasoning(summary=[], encrypted_content=sealed("hm")) == "hm"
    assert reasoning(summary=[{"type": "summary_text", "text": "short"}]) == "short"
    assert reasoning(summary=[], encrypted_content="gAAAAAB-of-another-server") == ""
    assert reasoning(summary=[], encrypted_content=sealed("hm")[:-1] + "*") == ""


def test_items_and_tools_that_only_openai_hosts_are_skipped() -> None:
    hosted = [
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "local_shell_call", "id": "l", "action": {}},
        {"type": "made_up_next_year"},
    ]
    assert texts([*hosted, {"role": "user", "content": "a"}]) == [("USER", "a")]
    request = chat(tools=[{"type": "web_search"}, {"type": "local_shell"}, ECHO])
    assert [tool.name for tool in request.generate.chat.tools] == ["echo"]


def test_media_travels_as_bytes_and_addresses_are_noted() -> None:
    data = base64.b64encode(b"bytes").decode()
    request = chat(
        [
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": f"data:image/png;base64,{data}", "detail": "low"},
                    {"type": "input_image", "image_url": "https://example.org/cat.png"},
                    {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
                    {"type": "input_file", "file_data": f"data:application/pdf;base64,{data}", "filename": "a.pdf"},
                ],
            }
        ]
    )
    image, linked, audio, file = request.generate.chat.messages[0].parts
    assert image.image == pb.Media(data=b"bytes", mime_type="image/png", detail="low")
    assert linked.image == pb.Media(detail="auto")
    assert audio.audio == pb.Media(data=b"bytes", mime_type="audio/wav")
    assert file.file == pb.Media(data=b"bytes", mime_type="application/pdf", detail="a.pdf")
    assert request.links == (Link("https://example.org/cat.png", "input[0].content[1].image_url"),)
    assert set(request.media) == {"image", "audio", "file"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [3]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://x"}]}]}, None),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"model": ""}, "model"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"moderation": {}}, "moderation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"truncation": "some"}, "truncation"),
        ({"background": True, "store": False}, "background"),
        ({"previous_response_id": "a", "conversation": "b"}, "previous_response_id"),
        ({"conversation": {}}, "conversation.id"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"text": {"format": {}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "structured_outputs"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].server_label"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [ECHO, ECHO]}, "tools[1].name"),
        ({"tools": [ECHO], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [ECHO], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ECHO], "tool_choice": {}}, "tool_choice.type"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"input": [{"role": "user", "content": ["x"] * 4097}]}, "input"),
        ({"tools": [ECHO], "tool_choice": {"type": "allowed_tools", "tools": [NESTED]}}, "tool_choice"),
        ({"tools": [{**ECHO, "parameters": NESTED}]}, "tools"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_the_name_of_its_field(fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**{"input": "hi", **fields}) if "model" not in fields else parse_responses_request(
            {**fields, "input": "x"}
        )
    assert param is None or caught.value.param == param


def test_only_what_is_read_of_an_item_is_kept() -> None:
    part = {"type": "input_image", "image_url": {"url": "data:image/png;base64,aGk=", "x": 1}, "y": NESTED}
    thought = {"type": "reasoning", "summary": [{"text": "a", "z": NESTED}, 3], "content": [{"type": "q", "text": "b"}]}
    image, reasoning = parse([{"role": "user", "content": [part]}, thought]).items
    assert image["content"] == [{"type": "input_image", "image_url": "data:image/png;base64,aGk=", "detail": "auto"}]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "a"}]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "b"}]


def test_null_means_absent_and_unknown_fields_mean_nothing() -> None:
    nulls = dict.fromkeys(
        """instructions tools tool_choice text reasoning include metadata temperature top_p max_output_tokens
        previous_response_id conversation parallel_tool_calls truncation store background stream user prompt""".split()  # noqa: SIM905
    )
    plain, same = parse(), parse(**nulls, client_metadata={"x": 1}, service_tier="fast", made_up=[1], text_=None)
    assert same.generate == plain.generate
    assert same.echo == plain.echo
    assert same.store is None
    assert not plain.generate.HasField("max_tokens")


def test_sampling_structure_reasoning_and_logprobs_reach_the_contract() -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    request = chat(
        temperature=0,
        top_p=0.5,
        seed=3,
        stop="END",
        max_output_tokens=7,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}, "verbosity": "low"},
        include=["message.output_text.logprobs", "file_search_call.results"],
        top_logprobs=2,
        keep_alive="5m",
        service_tier="flex",
    ).generate
    assert (request.keep_alive_ms, request.batch) == (300_000, True)
    assert request.sampling.HasField("temperature")
    assert (request.sampling.top_p, request.sampling.seed, list(request.stop)) == (0.5, 3, ["END"])
    assert request.max_tokens == 7
    assert request.chat.reasoning.effort == "low"
    assert request.constraint.json_schema == '{"type":"object","properties":{"z":{},"a":{}}}'
    assert request.top_logprobs == 2
    assert not chat(top_logprobs=0).generate.HasField("top_logprobs")
    assert chat(include=["message.output_text.logprobs"]).generate.HasField("top_logprobs")
    assert chat(reasoning={"effort": "none"}).generate.chat.reasoning.enabled is False
    assert chat(text={"format": {"type": "json_object"}}).generate.constraint.json_object


def test_tools_have_flat_names_for_the_model_and_their_own_for_the_client() -> None:
    request = parse(tools=[ECHO, PATCH, DEMO])
    assert [tool.name for tool in request.generate.chat.tools] == ["echo", "apply_patch", "mcp__demo__echo"]
    echo, patch, demo = request.generate.chat.tools
    assert echo.parameters_json == '{"type":"object","b":1,"a":2}'
    assert echo.strict
    assert json.loads(patch.parameters_json)["required"] == ["input"]
    assert demo.description == "[mcp__demo] A demo."
    binding = request.tools.binding("mcp__demo__echo")
    assert (binding.kind, binding.name, binding.namespace) == ("function", "echo", "mcp__demo")
    assert request.tools.binding("apply_patch").kind == "custom"
    assert request.tools.binding("unheard_of").kind == "function"


def test_a_custom_tools_regex_is_enforced_and_its_lark_grammar_is_told_to_the_model() -> None:
    def tool(syntax: str, definition: str) -> pb.Tool:
        form = {"type": "grammar", "syntax": syntax, "definition": definition}
        return parse(tools=[{**PATCH, "format": form}]).generate.chat.tools[0]

    regex = tool("regex", "[a-z]+")
    assert regex.strict
    assert json.loads(regex.parameters_json)["properties"]["input"]["pattern"] == "^(?:[a-z]+)$"
    lark = tool("lark", 'start: "x"')
    assert not lark.strict
    assert lark.description.endswith('start: "x"')


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ("auto", pb.TOOL_CHOICE_MODE_AUTO, []),
        ("none", pb.TOOL_CHOICE_MODE_NONE, []),
        ("required", pb.TOOL_CHOICE_MODE_REQUIRED, []),
        ({"type": "function", "name": "echo"}, pb.TOOL_CHOICE_MODE_REQUIRED, ["echo"]),
        ({"type": "function", "function": {"name": "echo"}}, pb.TOOL_CHOICE_MODE_REQUIRED, ["echo"]),
        ({"type": "custom", "name": "apply_patch"}, pb.TOOL_CHOICE_MODE_REQUIRED, ["apply_patch"]),
        (
            {"type": "function", "name": "echo", "namespace": "mcp__demo"},
            pb.TOOL_CHOICE_MODE_REQUIRED,
            ["mcp__demo__echo"],
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "echo"}]},
            pb.TOOL_CHOICE_MODE_REQUIRED,
            ["echo"],
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, pb.TOOL_CHOICE_MODE_NONE, []),
    ],
)
def test_every_shape_of_tool_choice_is_read(choice: Any, mode: pb.ToolChoiceMode, names: list[str]) -> None:
    parsed = parse(tools=[ECHO, PATCH, DEMO], tool_choice=choice, parallel_tool_calls=True).generate.chat.tool_choice
    assert parsed.mode == mode
    assert list(parsed.allowed_names) == names
    assert parsed.parallel is not (len(names) == 1 and choice["type"] != "allowed_tools")


def test_a_mixture_of_three_dialects_is_read_on_chats_path() -> None:
    body = {
        "model": "m",
        "input": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "input_text", "text": "list files"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "ok"}, {"type": "tool_use", "id": "t1"}]},
        ],
        "tools": [{"name": "ls", "description": "d", "input_schema": {"type": "object", "x": 1}}, PATCH],
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "stream": True,
    }
    body["input"][2]["content"][1] |= {"name": "ls", "input": {"path": "."}}  # type: ignore[index]
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a.py"}]}
    body["input"] += [  # type: ignore[operator]
        {"role": "user", "content": [result, {"type": "text", "text": "go on"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "t2", "function": {"name": "ls"}}]},
        {"role": "tool", "tool_call_id": "t2", "content": "b.py"},
        {"type": "function_call_output", "call_id": "t2", "output": "c.py"},
    ]
    assert is_foreign(body)
    request = parse_as_chat(body)
    got = request.generate.chat.messages
    assert [pb.Role.Name(m.role).removeprefix("ROLE_") for m in got] == [
        *("SYSTEM", "USER", "ASSISTANT", "TOOL", "USER", "ASSISTANT", "TOOL", "TOOL")
    ]
    assert got[2].tool_calls[0].arguments_json == '{"path":"."}'
    assert [m.parts[0].text for m in got[3:5]] == ["a.py", "go on"]
    assert request.generate.chat.tools[0].parameters_json == '{"type":"object","x":1}'
    assert (request.stream, request.include_usage, request.generate.max_tokens) == (True, True, 5)


def test_chats_own_bodies_are_not_taken_for_another_dialects() -> None:
    assert not is_foreign({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]})
    assert not is_foreign({"model": "m"})
    assert not is_foreign({"model": "m", "messages": "x", "input": "y"})
    blocks = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]}]
    assert is_foreign({"model": "m", "messages": blocks})
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    blocks[0]["content"].append(image)  # type: ignore[attr-defined]
    parts = parse_as_chat({"model": "m", "messages": blocks}).generate.chat.messages[1].parts
    assert parts[0].image == pb.Media(data=b"hi", mime_type="image/png", detail="auto")


@pytest.mark.parametrize("field", ["previous_response_id", "conversation", "background"])
def test_what_needs_the_store_is_refused_on_chats_path(field: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse_as_chat({"model": "m", "input": "x", field: "resp_1"})
    assert caught.value.param == field

"""OpenAI's chat dialect as pure functions: request in, contract out; events in, chunks and replies out."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest
from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb
from hostler.lifecycle.v1 import lifecycle_pb2

from gateway.dialects.openai_chat.reply import ReplyBuilder
from gateway.dialects.openai_chat.request import ChatRequest, check_capabilities, parse_chat_request
from gateway.dialects.openai_chat.shapes import usage_object
from gateway.dialects.openai_chat.stream import ChunkEncoder
from gateway.links import Link
from tests.gateway.event_frames import sse_data
from tests.gateway.fakes import finish, text

USER = {"role": "user", "content": "hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "b": 1, "a": 2}}}

NULLABLE = """
    temperature top_p n stop seed logprobs top_logprobs max_tokens tools tool_choice response_format stream
    stream_options logit_bias functions audio modalities reasoning_effort generation_config
    chat_template_kwargs parallel_tool_calls
""".split()  # noqa: SIM905


def parse(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return parse_chat_request({"model": "m", "messages": list(messages) or [USER], **fields})


def test_sampling_fields_reach_the_contract() -> None:
    sampling = parse(
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.25,
        seed=-1,
        frequency_penalty=1,
        presence_penalty=-1,
        repeat_penalty=1.5,
        logit_bias={"42": -100},
    ).generate.sampling
    assert sampling.HasField("temperature")
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 0, 0.25)
    assert sampling.seed == 2**64 - 1
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert dict(sampling.logit_bias) == {42: -100}


def test_null_means_absent_and_unknown_fields_mean_nothing() -> None:
    nulls = dict.fromkeys(NULLABLE)
    plain = parse()
    assert parse(**nulls) == plain
    assert parse(user="u", metadata={"a": "b"}, store=True, service_tier="auto", verbosity="low", made_up=[1]) == plain
    assert not plain.generate.HasField("max_tokens")
    assert not plain.generate.HasField("constraint")


def test_every_role_and_shape_of_content_is_read() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1}'}}
    messages = parse(
        {"role": "developer", "content": "be brief"},
        {"role": "system", "content": [{"type": "text", "text": "and kind"}]},
        {"role": "user", "content": "", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "name": "f", "tool_call_id": "c1", "tool_calls": None, "content": ""},
        {"role": "assistant", "function_call": {"name": "g", "arguments": "{}"}},
        {"role": "function", "name": "g", "content": "done"},
        {"role": "assistant"},
    ).generate.chat.messages
    assert [message.role for message in messages] == [
        pb.ROLE_DEVELOPER,
        pb.ROLE_SYSTEM,
        pb.ROLE_USER,
        pb.ROLE_ASSISTANT,
        pb.ROLE_TOOL,
        pb.ROLE_ASSISTANT,
        pb.ROLE_TOOL,
        pb.ROLE_ASSISTANT,
    ]
    assert messages[1].parts[0].text == "and kind"
    assert messages[2].name == "ann"
    assert messages[3].tool_calls[0].arguments_json == '{"b": 1}'
    assert messages[3].reasoning == "hm"
    assert messages[4].tool_call_id == "c1"
    assert messages[5].tool_calls[0].name == "g"


def test_media_travels_as_bytes() -> None:
    data = base64.b64encode(b"bytes").decode()
    request = parse(
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
                {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{data}", "filename": "a.pdf"}},
            ],
        }
    )
    image, audio, file = request.generate.chat.messages[0].parts
    assert image.image == pb.Media(data=b"bytes", mime_type="image/png", detail="low")
    assert audio.audio == pb.Media(data=b"bytes", mime_type="audio/wav")
    assert file.file == pb.Media(data=b"bytes", mime_type="application/pdf", detail="a.pdf")
    assert request.media == {f: f"messages[0].content[{i}]" for i, f in enumerate(("image", "audio", "file"))}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://" + "x" * 9000}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,***"}},
        {"type": "image_url", "image_url": {"url": "data:image/png,raw"}},
        {"type": "image_url"},
        {"type": "input_audio", "input_audio": {"data": ""}},
        {"type": "file", "file": {"file_id": "file-1"}},
    ],
)
def test_media_that_is_not_in_the_request_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse({"role": "user", "content": [part]})
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages[0].content[0].")


def test_addresses_of_images_are_noted_with_the_field_that_holds_them() -> None:
    inline = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    request = parse(
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "https://example.org/cat.png", "detail": "low"}},
                inline,
                {"type": "image_url", "image_url": "HTTP://example.org/dog.png"},
            ],
        }
    )
    assert request.links == (
        Link("https://example.org/cat.png", "messages[0].content[0].image_url.url"),
        Link("HTTP://example.org/dog.png", "messages[0].content[2].image_url"),
    )
    images = [part.image for part in request.generate.chat.messages[0].parts]
    assert [image.data for image in images] == [b"", b"hi", b""]
    assert images[0].detail == "low"
    with pytest.raises(InvalidRequest, match="at most 32"):
        parse({"role": "user", "content": [inline] * 33})


def test_tools_keep_the_order_of_their_keys() -> None:
    tool = parse(tools=[WEATHER]).generate.chat.tools[0]
    assert tool.parameters_json == '{"type":"object","b":1,"a":2}'


def test_tool_choice_has_four_shapes() -> None:
    def choice(value: object) -> pb.ToolChoice:
        return parse(tools=[WEATHER], tool_choice=value).generate.chat.tool_choice

    assert choice("auto").mode == pb.TOOL_CHOICE_MODE_AUTO
    assert choice("none").mode == pb.TOOL_CHOICE_MODE_NONE
    named = choice({"type": "function", "function": {"name": "weather"}})
    assert (named.mode, list(named.allowed_names)) == (pb.TOOL_CHOICE_MODE_REQUIRED, ["weather"])
    allowed = choice({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WEATHER]}})
    assert (allowed.mode, list(allowed.allowed_names)) == (pb.TOOL_CHOICE_MODE_AUTO, ["weather"])
    with pytest.raises(InvalidRequest):
        choice({"type": "function", "function": {"name": "unknown"}})
    assert parse(tools=[WEATHER], parallel_tool_calls=False).generate.chat.tool_choice.parallel is False
    assert not parse(tools=[WEATHER]).generate.chat.HasField("tool_choice")


def test_response_formats_become_constraints() -> None:
    assert not parse(response_format={"type": "text"}).generate.HasField("constraint")
    assert parse(response_format={"type": "json_object"}).generate.constraint.json_object
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert orjson.loads(parse(response_format=form).generate.constraint.json_schema) == schema


def test_the_names_of_other_servers_become_constraints() -> None:
    def constraint(**fields: Any) -> pb.Constraint:
        return parse(**fields).generate.constraint

    schema = {"type": "object"}
    assert orjson.loads(constraint(guided_json=schema).json_schema) == schema
    assert orjson.loads(constraint(guided_json='{"type": "object"}').json_schema) == schema
    assert orjson.loads(constraint(structured_outputs={"json": schema}).json_schema) == schema
    assert constraint(structured_outputs={"json_object": True}).json_object
    assert constraint(guided_regex="a+").regex == "a+"
    assert constraint(structured_outputs={"regex": "a+"}).regex == "a+"
    assert constraint(guided_grammar="start: /a/").grammar == "start: /a/"
    assert constraint(guided_choice=["yes", 'n"o']).grammar == 'start: "yes" | "n\\"o"'


def test_reasoning_has_several_names_for_one_wish() -> None:
    def reasoning(**fields: Any) -> pb.Reasoning:
        return parse(**fields).generate.chat.reasoning

    assert reasoning(reasoning={"effort": "high", "max_tokens": 64}) == pb.Reasoning(effort="high", budget_tokens=64)
    assert reasoning(reasoning={"enabled": False}) == pb.Reasoning(enabled=False)
    assert reasoning(enable_thinking=True, thinking_budget=9) == pb.Reasoning(enabled=True, budget_tokens=9)
    assert reasoning(thinking_token_budget=0) == pb.Reasoning(budget_tokens=0)


def test_reasoning_and_template_options_are_handed_on() -> None:
    chat = parse(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}).generate.chat
    assert chat.reasoning.effort == "low"
    assert chat.template_kwargs_json == '{"enable_thinking":false}'
    assert parse(reasoning_effort="none").generate.chat.reasoning.enabled is False


def test_a_generation_config_fills_what_the_request_leaves_open() -> None:
    config = orjson.dumps(
        {
            "do_sample": False,
            "max_new_tokens": 20,
            "top_k": 50,
            "stop_strings": ["a"],
            "eos_token_id": [1],
            "repetition_penalty": 1.5,
            "transformers_version": "5.0",
        }
    ).decode()
    generate = parse(generation_config=config).generate
    assert generate.sampling.HasField("temperature")
    assert (generate.sampling.temperature, generate.sampling.top_k, generate.max_tokens) == (0, 50, 20)
    assert (list(generate.stop), generate.sampling.repetition_penalty) == (["a"], 1.5)
    generate = parse(generation_config=config, temperature=1, max_completion_tokens=7, repeat_penalty=1.25).generate
    assert (generate.sampling.temperature, generate.max_tokens, generate.sampling.repetition_penalty) == (1, 7, 1.25)


def test_stop_is_a_string_or_strings_and_empty_ones_say_nothing() -> None:
    assert list(parse(stop="x").generate.stop) == ["x"]
    assert list(parse(stop=["x", "", "y"]).generate.stop) == ["x", "y"]


def test_only_what_the_model_can_do_is_let_through() -> None:
    forced = parse(tools=[WEATHER], tool_choice="required")
    with pytest.raises(UnsupportedParameter):
        check_capabilities(forced, lifecycle_pb2.ModelInfo())
    check_capabilities(forced, lifecycle_pb2.ModelInfo(supports_tools=True))
    check_capabilities(parse(tools=[WEATHER]), lifecycle_pb2.ModelInfo())


def test_choices_differ_only_in_their_seed() -> None:
    request = parse(n=2, seed=2**64 - 1)
    assert [request.choice(i).sampling.seed for i in range(2)] == [2**64 - 1, 0]
    assert request.generate.sampling.seed == 2**64 - 1
    assert not parse().choice(0).sampling.HasField("seed")


# ---------------------------------------------------------------- events out


def tool_call_events(index: int) -> list[pb.GenerateResponse]:
    return [
        pb.GenerateResponse(tool_call_start=pb.ToolCallStart(index=index, id=f"c{index}", name="f")),
        pb.GenerateResponse(tool_call_arguments=pb.ToolCallArguments(index=index, json_fragment='{"a":')),
        pb.GenerateResponse(tool_call_arguments=pb.ToolCallArguments(index=index, json_fragment="1}")),
        pb.GenerateResponse(tool_call_end=pb.ToolCallEnd(index=index)),
    ]


def encode(*events: pb.GenerateResponse, **options: Any) -> list[dict[str, Any]]:
    encoder = ChunkEncoder(reply_id="r", created_unix_s=1, model="m", **options)
    frames = b"".join(encoder.encode(0, event) for event in events)
    if options.get("include_usage"):
        frames += encoder.usage()
    return [orjson.loads(data) for data in sse_data(frames.decode())]


def test_a_text_stream_has_role_first_and_one_finish_reason() -> None:
    chunks = encode(
        pb.GenerateResponse(progress=pb.Progress()), text('a "quoted"\n'), text("é\u2028\u2029\x85"), finish()
    )
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": 'a "quoted"\n'},
        {"content": "é\u2028\u2029\x85"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks} == {
        ("r", "chat.completion.chunk", 1, "m")
    }


def test_a_tool_calls_id_type_and_name_come_once() -> None:
    chunks = encode(*tool_call_events(0), *tool_call_events(1), finish())
    calls = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks[1:-1]]
    for index in range(2):
        first, *rest = [call for call in calls if call["index"] == index]
        assert first == {
            "index": index,
            "id": f"c{index}",
            "type": "function",
            "function": {"name": "f", "arguments": ""},
        }
        assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in rest)
        assert "".join(call["function"]["arguments"] for call in rest) == '{"a":1}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_reasoning_has_its_own_field() -> None:
    event = pb.GenerateResponse(reasoning=pb.ReasoningDelta(text="hm"))
    assert encode(event)[1]["choices"][0]["delta"] == {"reasoning_content": "hm"}


def test_usage_is_null_until_its_own_chunk() -> None:
    chunks = encode(text("a"), finish(4), include_usage=True)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None, None]
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 4, 9)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


def test_what_one_choice_computed_for_the_others_was_not_cached_before() -> None:
    usages = [pb.Usage(num_prompt_tokens=88, num_cached_tokens=n, num_completion_tokens=3) for n in (80, 0, 80)]
    told = usage_object(usages)
    assert (told["prompt_tokens"], told["completion_tokens"]) == (88, 9)
    assert told["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage_object(usages[::2])["prompt_tokens_details"]["cached_tokens"] == 80


def test_logprobs_show_bytes_of_half_characters_and_no_infinity() -> None:
    top = [pb.TokenLogprob(token=b"b", logprob=float("-inf"))]
    delta = pb.TextDelta(text="a", logprobs=[pb.TokenLogprob(token=b"\xc3", logprob=-0.5, top=top)])
    chunk = encode(pb.GenerateResponse(text=delta), wants_logprobs=True)[1]
    assert chunk["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "\ufffd",
                "logprob": -0.5,
                "bytes": [0xC3],
                "top_logprobs": [{"token": "b", "logprob": -9999.0, "bytes": [98]}],
            }
        ],
        "refusal": None,
    }


def test_a_whole_reply_gathers_text_reasoning_and_calls() -> None:
    builder = ReplyBuilder(reply_id="r", created_unix_s=1, model="m", n=2)
    for event in (pb.GenerateResponse(reasoning=pb.ReasoningDelta(text="hm")), text("a"), text("b"), finish(2)):
        builder.add(0, event)
    for event in (*tool_call_events(0), finish(3, reason=pb.FINISH_REASON_LENGTH)):
        builder.add(1, event)
    reply = builder.build()
    first, second = reply["choices"]
    assert first["message"] == {"role": "assistant", "content": "ab", "refusal": None, "reasoning_content": "hm"}
    assert (first["finish_reason"], second["finish_reason"]) == ("stop", "length")
    assert second["message"]["content"] is None
    call = {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    assert second["message"]["tool_calls"] == [call]
    assert reply["usage"]["completion_tokens"] == 5
    assert reply["object"] == "chat.completion"
    assert reply["system_fingerprint"].startswith("fp_")

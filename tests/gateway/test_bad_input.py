"""Bad input: always a 4xx in OpenAI's shape, soon, and never at the cost of anybody else's stream."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hostler.errors import InvalidRequest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.body import parse_json
from gateway.dialects.openai_chat.request import parse_chat_request
from tests.gateway.fakes import MODEL, World, finish, text, world

HELLO = [{"role": "user", "content": "x"}]
BODIES = {
    "no body": b"",
    "invalid JSON": b'{"model": ',
    "not an object": b"[]",
    "NaN": b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "infinite": b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
    "huge integer": b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 5000 + b"}",
    "lone surrogate": b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
    "not UTF-8": b'{"model":"\xff"}',
    "deep nesting": b"[" * 100_000,
    "deep tool schema": b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"tools":[{"function":{"name":"f",'
    b'"parameters":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}]}",
    "a bomb of lists": b"[" + b"[]," * 2_000_000 + b"[]]",
    "a bomb of keys": b"{" + b",".join(b'"%d":1' % i for i in range(500_000)) + b"}",
}
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": "m" * 1000}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": HELLO * 5000}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"temperature": 1e9}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": -1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 2**65}, "seed"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a" * 513]}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": 1}, "stop"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"tools": [{"type": "custom"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"function": {"name": "f"}}] * 513}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "perhaps"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", 1]}, "guided_choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a" * 20000}}, "structured_outputs.regex"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"reasoning": {"max_tokens": -1}}, "reasoning.max_tokens"),
    ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "reasoning_effort"),
    ({"generation_config": "{"}, "generation_config"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
]


def is_openai_error(value: dict[str, Any]) -> bool:
    return set(value) == {"error"} and set(value["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", BODIES)
def test_the_parser_refuses(name: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_chat_request(parse_json(BODIES[name]))


async def test_every_bad_field_is_a_400_that_names_it(called: World) -> None:
    for fields, param in FIELDS:
        reply = await called.client.post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO, **fields})
        assert reply.status_code == 400, fields
        assert is_openai_error(reply.json())
        assert reply.json()["error"]["param"] == param, reply.json()
    assert called.worker.requests == []


async def test_bad_bodies_are_answered_at_once_while_streams_run_on(served: World) -> None:
    stop = asyncio.Event()

    async def tick(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        while not stop.is_set():
            yield text("x")
            await asyncio.sleep(0.01)
        yield finish()

    served.worker.script = tick
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    gaps: list[float] = []

    async def listen() -> None:
        async with served.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            times = [time.monotonic() async for _ in reply.aiter_raw()]
            gaps.extend(later - earlier for earlier, later in itertools.pairwise(times))

    listeners = [asyncio.create_task(listen()) for _ in range(4)]
    await served.worker.until_running(4)
    headers = {"content-type": "application/json"}
    for name, content in BODIES.items():
        reply = await served.client.post("/v1/chat/completions", content=content, headers=headers)
        assert reply.status_code == 400, name
        assert is_openai_error(reply.json()), name
    prompt = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "word " * 800_000}]})
    reply = await served.client.post("/v1/chat/completions", content=prompt, headers=headers)
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    stop.set()
    await asyncio.gather(*listeners)
    # Client, gateway and worker share this one loop, and the machine is shared, too: the bound is loose.
    assert max(gaps) < 0.5


async def test_a_body_over_the_cap_is_refused_by_its_header_or_on_the_way() -> None:
    async with world(config={"max_body": 100_000}) as here:
        headers = {"content-type": "application/json"}
        reply = await here.client.post("/v1/chat/completions", content=b"x" * 5_000_000, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "payload_too_large")

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b"x" * 100_000

        reply = await here.client.post("/v1/chat/completions", content=chunks(), headers=headers)
        assert reply.status_code == 413
        assert (await here.chat("still well")).status_code == 200


async def test_forms_and_plain_text_are_refused(called: World) -> None:
    body = orjson.dumps({"model": MODEL, "messages": HELLO})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = await called.client.post("/v1/chat/completions", content=body, headers={"content-type": kind})
        assert reply.status_code == 415
    reply = await called.client.post("/v1/chat/completions", content=body, headers={"origin": "http://localhost:3000"})
    assert reply.status_code == 415
    assert (await called.client.post("/v1/chat/completions", content=body)).status_code == 200


async def test_an_unknown_model_is_a_404(called: World) -> None:
    reply = await called.chat("x", model="gpt-nothing")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert reply.json()["error"]["param"] == "model"


async def test_broken_http_and_long_heads_are_answered_in_shape_and_closed(served: World) -> None:
    port = int(served.url.rpartition(":")[2])
    long_head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 20_000 + b"\r\n\r\n"
    for request in (b"this is not http\r\n\r\n", long_head):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        reply = await asyncio.wait_for(reader.read(), 5)
        head, _, body = reply.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert is_openai_error(orjson.loads(body))
        writer.close()

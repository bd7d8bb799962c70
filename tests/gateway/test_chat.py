"""Chat completions over real HTTP and gRPC: what clients see when all is well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import orjson
from hostler.errors import ContextLengthExceeded, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from tests.gateway.event_frames import sse_data
from tests.gateway.fakes import MODEL, World, echo, finish, last_text, route, text


async def test_the_sync_sdk_gets_whole_and_streamed_replies(served: World) -> None:
    def ask() -> tuple[str | None, str, int]:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
            messages = [{"role": "user", "content": "one two three"}]
            whole = client.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]
            stream = client.chat.completions.create(
                model=MODEL,
                messages=messages,  # type: ignore[arg-type]
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices].count("stop") == 1
            assert whole.usage is not None
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.total_tokens == whole.usage.total_tokens == 8
            return whole.choices[0].message.content, joined, len(chunks)

    whole, joined, num_chunks = await asyncio.to_thread(ask)
    assert whole == joined == "one two three"
    assert num_chunks == 6  # role, three words, finish, usage


async def test_the_async_sdk_streams_and_lists_models_from_the_root_too(served: World) -> None:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="unused") as client:
        stream = await client.chat.completions.create(
            model="TINY", messages=[{"role": "user", "content": "a b"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a b"
        assert {chunk.model for chunk in chunks} == {MODEL}
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "org"


async def test_a_stream_has_the_headers_that_proxies_need(served: World) -> None:
    reply = await served.chat("hi", stream=True)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert "content-length" not in reply.headers
    assert sse_data(reply.text)[-1] == "[DONE]"


async def test_no_usage_chunk_comes_unasked(served: World) -> None:
    reply = await served.chat("hi", stream=True)
    chunks = [orjson.loads(data) for data in sse_data(reply.text)[:-1]]
    assert all(chunk["choices"] for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)


async def test_each_delta_leaves_at_once(served: World) -> None:
    go = asyncio.Event()

    async def wait_in_the_middle(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("first")
        await go.wait()
        yield text(" second")
        yield finish(2)

    served.worker.script = wait_in_the_middle
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with served.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        seen = ""
        async for piece in reply.aiter_text():
            seen += piece
            if '"first"' in seen:
                go.set()
    assert '" second"' in seen


async def test_n_choices_share_one_stream_with_their_own_indexes_and_seeds(served: World) -> None:
    async def say_the_seed(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text(str(request.sampling.seed))
        yield finish(3)

    served.worker.script = say_the_seed
    whole = (await served.chat("x", n=3, seed=40)).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["40", "41", "42"]
    assert whole["usage"]["completion_tokens"] == 9
    assert whole["usage"]["prompt_tokens"] == 5

    streamed = await served.chat("x", n=3, stream=True, stream_options={"include_usage": True})
    chunks = [orjson.loads(data) for data in sse_data(streamed.text)[:-1]]
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert [choice["finish_reason"] for choice in own] == [None, None, "stop"]
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    seeds = {chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"]}
    assert len(seeds - {None, ""}) == 3  # no seed given: each choice draws its own


async def test_one_failing_choice_ends_all_of_them(served: World) -> None:
    async def fail_the_second(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if request.sampling.seed == 1:
            raise ContextLengthExceeded("too long", param="messages")
        await asyncio.Event().wait()
        yield finish()

    served.worker.script = fail_the_second
    reply = await served.chat("x", n=2, seed=0)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    await served.worker.until_running(0)


async def test_two_requests_with_one_request_id_both_get_their_own_answer(served: World) -> None:
    gate = asyncio.Event()

    async def together(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await gate.wait()
        async for event in echo(request):
            yield event

    served.worker.script = together
    headers = {"x-request-id": "same-id"}
    asked = [
        asyncio.create_task(
            served.client.post(
                "/v1/chat/completions",
                json={"model": MODEL, "messages": [{"role": "user", "content": word}]},
                headers=headers,
            )
        )
        for word in ("left", "right")
    ]
    await served.worker.until_running(2)
    gate.set()
    replies = [await task for task in asked]
    assert [reply.json()["choices"][0]["message"]["content"] for reply in replies] == ["left", "right"]
    assert {reply.headers["x-request-id"] for reply in replies} == {"same-id"}
    assert replies[0].json()["id"] != replies[1].json()["id"]
    assert served.worker.request_ids == ["same-id", "same-id"]


async def test_what_the_worker_refuses_is_a_400_before_the_first_byte(served: World) -> None:
    async def refuse(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise UnsupportedParameter("'response_format' is not supported by this model.", param="response_format")
        yield

    served.worker.script = refuse
    for stream in (False, True):
        reply = await served.chat("x", stream=stream, response_format={"type": "json_object"})
        assert reply.status_code == 400
        assert reply.json() == {
            "error": {
                "message": "'response_format' is not supported by this model.",
                "type": "invalid_request_error",
                "param": "response_format",
                "code": "unsupported_parameter",
            }
        }
        assert reply.headers["x-request-id"]


async def test_the_least_loaded_replica_gets_the_next_request(served: World) -> None:
    other = await served.add_worker("b")
    await served.publish(route(served.worker, other))
    gate = asyncio.Event()

    async def hold(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await gate.wait()
        yield finish()

    served.worker.script = other.script = hold
    asked = []
    for number in (1, 2):
        asked += [asyncio.create_task(served.chat(str(number))) for _ in range(2)]
        await served.worker.until_running(number)
        await other.until_running(number)
    gate.set()
    await asyncio.gather(*asked)
    assert [len(served.worker.requests), len(other.requests)] == [2, 2]


async def test_what_a_text_model_cannot_do_is_refused_before_it_is_asked(served: World) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    reply = await served.chat([{"type": "text", "text": "what is this"}, image])  # type: ignore[arg-type]
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages[0].content[1]"
    tools = [{"type": "function", "function": {"name": "f"}}]
    reply = await served.chat("x", tools=tools, tool_choice="required")
    assert reply.json()["error"]["code"] == "unsupported_parameter"
    assert (await served.chat("x", tools=tools)).status_code == 200
    reply = await served.chat("word " * 600_000)
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert len(served.worker.requests) == 1
    await served.publish(route(served.worker, supports_images=True))
    assert (await served.chat([image])).status_code == 200  # type: ignore[arg-type]
    assert served.worker.requests[-1].chat.messages[0].parts[0].image.data == b"hi"


async def test_the_worker_gets_what_the_client_wrote(served: World) -> None:
    await served.chat("hello", temperature=0.9, max_tokens=1000, stop="END", top_p=0.5)
    request = served.worker.requests[0]
    assert last_text(request) == "hello"
    assert request.max_tokens == 1000
    assert list(request.stop) == ["END"]
    assert round(request.sampling.temperature, 3) == 0.9
    assert not request.sampling.HasField("seed")

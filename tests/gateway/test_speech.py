"""POST /v1/audio/speech and GET /v1/audio/voices, with a worker that says what it is told to."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hostler.errors import Internal, InvalidRequest, Unavailable, WorkerLost
from hostler.inference.v1 import speaking_pb2 as pb
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2

from tests.gateway.fakes import MODEL, World, route
from tests.gateway.speaking import two_sounds

TEXT = "Hello there."


async def publish(world: World, **info: Any) -> None:
    published = route(*world.workers, **info)
    published.engine = lifecycle_pb2.ENGINE_KIND_SPEECH
    await world.publish(published)


@pytest.fixture
async def speaker(called: World) -> World:
    await publish(called, voices=["joe"])
    return called


async def say(world: World, **fields: Any) -> httpx.Response:
    return await world.client.post("/v1/audio/speech", json={"model": MODEL, "input": TEXT, "voice": "joe", **fields})


@pytest.mark.parametrize(
    ("format", "media_type"),
    [
        (None, "audio/mpeg"),
        ("mp3", "audio/mpeg"),
        ("opus", "audio/ogg"),
        ("aac", "audio/aac"),
        ("flac", "audio/flac"),
        ("wav", "audio/wav"),
        ("pcm", "audio/pcm"),
    ],
)
async def test_the_workers_bytes_are_the_reply_under_the_formats_name(
    speaker: World, format: str | None, media_type: str
) -> None:
    reply = await say(speaker, response_format=format)
    assert (reply.status_code, reply.content) == (200, TEXT.encode())
    assert reply.headers["content-type"] == media_type
    assert "content-length" not in reply.headers
    assert speaker.worker.asked[0].format == (format or "mp3")


async def test_what_the_request_says_reaches_the_worker(speaker: World) -> None:
    reply = await say(
        speaker, voice={"id": "joe"}, speed=1.5, instructions="Whisper.", keep_alive="5m", stream_format="audio", x=1
    )
    assert reply.status_code == 200
    asked = speaker.worker.asked[0]
    assert (asked.text, asked.voice, asked.speed, asked.instructions) == (TEXT, "joe", 1.5, "Whisper.")
    assert asked.keep_alive_ms == 300_000
    plain = await speaker.client.post("/audio/speech", json={"model": MODEL, "input": TEXT, "voice": None})
    assert plain.status_code == 200
    asked = speaker.worker.asked[1]
    assert (asked.voice, asked.HasField("speed"), asked.HasField("keep_alive_ms")) == ("", False, False)


async def test_as_events_it_comes_in_base64_and_ends_with_the_usage(speaker: World) -> None:
    reply = await say(speaker, stream_format="sse")
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 2 + ["speech.audio.done"]
    assert b"".join(base64.b64decode(event["audio"]) for event in events[:2]) == TEXT.encode()
    assert events[-1]["usage"] == {"input_tokens": 3, "output_tokens": 40, "total_tokens": 43}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": " \n "}, "input"),
        ({"input": 5}, "input"),
        ({"input": "a" * 4097}, "input"),
        ({"voice": 5}, "voice"),
        ({"voice": {}}, "voice.id"),
        ({"response_format": "midi"}, "response_format"),
        ({"speed": 0.2}, "speed"),
        ({"speed": 4.1}, "speed"),
        ({"stream_format": "xml"}, "stream_format"),
        ({"instructions": 5}, "instructions"),
    ],
)
async def test_bad_requests_name_the_field(speaker: World, fields: dict[str, Any], param: str) -> None:
    reply = await say(speaker, **fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert speaker.worker.asked == []


async def test_4096_characters_are_spoken(speaker: World) -> None:
    assert (await say(speaker, input="a" * 4096)).status_code == 200


async def test_a_workers_refusal_is_an_ordinary_error(speaker: World) -> None:
    async def refuse(request: pb.SpeakRequest) -> AsyncIterator[pb.SpeakResponse]:
        raise InvalidRequest("no such voice", param="voice")
        yield

    speaker.worker.speech = refuse
    for stream_format in ("audio", "sse"):
        reply = await say(speaker, stream_format=stream_format)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "voice")


async def test_a_worker_that_is_lost_before_its_first_sound_costs_time_only(speaker: World) -> None:
    async def drain(request: pb.SpeakRequest) -> AsyncIterator[pb.SpeakResponse]:
        raise Unavailable("draining")
        yield

    speaker.worker.speech = drain
    other = await speaker.add_worker("b", generation=8)
    await publish(speaker)
    for _ in range(3):
        reply = await say(speaker)
        assert (reply.status_code, reply.content) == (200, TEXT.encode())
    assert len(other.asked) == 3


async def test_audio_that_fails_half_way_breaks_the_connection_off(served: World) -> None:
    await publish(served)

    async def half(request: pb.SpeakRequest) -> AsyncIterator[pb.SpeakResponse]:
        yield pb.SpeakResponse(audio=b"half")
        raise WorkerLost("gone")

    served.worker.speech = half
    with pytest.raises(httpx.RemoteProtocolError):
        await say(served)
    events = (await say(served, stream_format="sse")).text
    assert "speech.audio.delta" in events
    assert json.loads(events.strip().splitlines()[-1][6:])["error"]["code"] == "worker_lost"


async def test_audio_that_ends_without_the_workers_last_word_is_no_whole_reply(served: World) -> None:
    await publish(served)

    async def cut_short(request: pb.SpeakRequest) -> AsyncIterator[pb.SpeakResponse]:
        yield pb.SpeakResponse(audio=b"half")

    served.worker.speech = cut_short
    with pytest.raises(httpx.RemoteProtocolError):
        await say(served)


async def test_an_internal_failure_tells_nothing_of_the_text(speaker: World) -> None:
    async def fail(request: pb.SpeakRequest) -> AsyncIterator[pb.SpeakResponse]:
        raise Internal("The worker failed on this request.")
        yield

    speaker.worker.speech = fail
    reply = await say(speaker)
    assert reply.status_code == 500
    assert TEXT not in reply.text


async def test_sound_arrives_while_the_rest_is_still_being_made(served: World) -> None:
    await publish(served)
    heard = asyncio.Event()

    async def patient(request: pb.SpeakRequest) -> AsyncIterator[pb.SpeakResponse]:
        yield pb.SpeakResponse(audio=b"first")
        await heard.wait()
        async for event in two_sounds(request):
            yield event

    served.worker.speech = patient
    body = {"model": MODEL, "input": TEXT, "voice": "joe"}
    async with served.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        chunks = reply.aiter_raw()
        assert await asyncio.wait_for(anext(chunks), 5) == b"first"
        heard.set()
        assert b"".join([chunk async for chunk in chunks]) == TEXT.encode()


async def test_a_client_that_leaves_ends_the_workers_call(served: World) -> None:
    await publish(served)

    async def endless(request: pb.SpeakRequest) -> AsyncIterator[pb.SpeakResponse]:
        while True:
            yield pb.SpeakResponse(audio=b"la")
            await asyncio.sleep(0)

    served.worker.speech = endless
    body = {"model": MODEL, "input": TEXT, "voice": "joe"}
    async with served.client.stream("POST", "/v1/audio/speech", json=body) as reply:
        assert reply.status_code == 200
        await served.worker.until_running(1)
    await served.worker.until_running(0)


async def test_the_metrics_count_speech_by_its_time_and_its_first_sound(speaker: World) -> None:
    assert (await say(speaker)).status_code == 200
    told = (await speaker.client.get("/metrics")).text.splitlines()
    labels = f'gen_ai_operation_name="speech",gen_ai_request_model="{MODEL}"'
    assert f"gen_ai_server_time_to_first_token_seconds_count{{{labels}}} 1.0" in told
    assert not [line for line in told if line.startswith("gen_ai_server_time_per_output_token") and "speech" in line]


async def test_only_models_that_speak_speak_and_they_do_nothing_else(called: World) -> None:
    await called.publish(route(called.worker))
    reply = await say(called)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    await publish(called)
    assert (await called.chat()).status_code == 400
    assert (await called.client.post("/v1/embeddings", json={"model": MODEL, "input": "a"})).status_code == 400
    assert called.worker.asked == []


async def test_voices_are_listed_as_open_webui_reads_them(called: World) -> None:
    loaded = route(called.worker, name="loaded", aliases=(), voices=["amy", "bob"])
    unloaded = route(name="unloaded", aliases=(), state=placement_pb2.MODEL_STATE_UNLOADED)
    for published in (loaded, unloaded):
        published.engine = lifecycle_pb2.ENGINE_KIND_SPEECH
    await called.publish(loaded, unloaded, route(name="writer", aliases=()))
    for path in ("/v1/audio/voices", "/audio/voices"):
        listed = (await called.client.get(path)).json()["voices"]
        assert {voice["id"]: voice["name"] for voice in listed} == {"amy": "amy", "bob": "bob", "default": "default"}
        assert [voice["model"] for voice in listed] == ["loaded", "loaded", "unloaded"]
    one = (await called.client.get("/audio/voices", params={"model": "loaded"})).json()["voices"]
    assert [voice["id"] for voice in one] == ["amy", "bob"]
    refused = await called.client.get("/audio/voices", params={"model": "writer"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")

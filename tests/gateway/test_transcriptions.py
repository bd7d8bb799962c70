"""POST /v1/audio/transcriptions and /translations (OpenAI's rules), GET /v1/audio/models; the worker is a fake."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hostler.errors import InvalidRequest, WorkerLost
from hostler.inference.v1 import hearing_pb2
from hostler.inference.v1 import inference_pb2 as pb
from hostler.lifecycle.v1 import lifecycle_pb2

from gateway.multipart import MAX_FILE_BYTES
from tests.gateway.fakes import MODEL, World, route, world
from tests.gateway.hearing import two_segments

SAID = b"Go forward ten meters."
PATH = "/v1/audio/transcriptions"


async def publish(here: World) -> None:
    published = route(here.worker)
    published.engine = lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION
    await here.publish(published)


@pytest.fixture
async def hearer(called: World) -> World:
    await publish(called)
    return called


async def send(here: World, path: str = PATH, data: bytes = SAID, **fields: Any) -> httpx.Response:
    named = {name.replace("__", "[]"): value for name, value in fields.items()}
    files = {"file": ("a.wav", data, "audio/wav")}
    return await here.client.post(path, data={"model": MODEL, **named}, files=files)


def refused(reply: httpx.Response, status: int, param: str | None) -> None:
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert error["message"]


async def test_json_is_the_default_and_tells_the_text_and_the_seconds(hearer: World) -> None:
    reply = await send(hearer)
    assert reply.json() == {"text": SAID.decode(), "usage": {"type": "duration", "seconds": 9}}
    (asked,) = hearer.worker.asked
    assert (asked.audio.data, asked.task) == (SAID, hearing_pb2.TRANSCRIBE_TASK_TRANSCRIBE)
    assert not asked.segment_timestamps
    assert not asked.HasField("temperature")


async def test_the_metrics_count_a_transcription_as_one(hearer: World) -> None:
    """A past bug: they counted it as a count of tokens."""
    assert (await send(hearer)).status_code == 200
    told = (await hearer.client.get("/metrics")).text.splitlines()
    labels = f'gen_ai_operation_name="transcription",gen_ai_request_model="{MODEL}"'
    assert f"gen_ai_server_time_to_first_token_seconds_count{{{labels}}} 1.0" in told


async def test_text_is_the_text_alone(hearer: World) -> None:
    reply = await send(hearer, response_format="text")
    assert (reply.text, reply.headers["content-type"]) == (f"{SAID.decode()}\n", "text/plain; charset=utf-8")


async def test_subtitles_have_clocks_over_an_hour_and_no_arrows_in_their_text(hearer: World) -> None:
    srt = await send(hearer, response_format="srt", data=b"one --> 1 two again")
    assert srt.text == ("1\n00:00:00,000 --> 00:00:01,250\none -> 1\n\n2\n01:01:01,500 --> 01:01:02,750\ntwo again\n\n")
    vtt = await send(hearer, response_format="vtt", data=b"a b")
    assert vtt.text.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.250\na\n\n01:01:01.500 --> ")
    assert vtt.headers["content-type"] == "text/vtt; charset=utf-8"


async def test_verbose_json_tells_segments_and_words_as_they_are_asked_for(hearer: World) -> None:
    plain = (await send(hearer, response_format="verbose_json")).json()
    assert (plain["task"], plain["language"], plain["duration"]) == ("transcribe", "english", 8.2)
    assert plain["text"] == SAID.decode()
    assert "words" not in plain
    times, quality = {"id", "seek", "start", "end"}, {"avg_logprob", "compression_ratio", "no_speech_prob"}
    wanted = {*times, "text", "tokens", "temperature", *quality}
    assert [set(segment) for segment in plain["segments"]] == [wanted] * 2
    words = (await send(hearer, response_format="verbose_json", timestamp_granularities__=["word"])).json()
    assert "segments" not in words
    assert words["words"][1] == {"word": "ten meters.", "start": 3661.5, "end": 3662.5}
    both = (await send(hearer, response_format="verbose_json", timestamp_granularities__=["word", "segment"])).json()
    assert len(both["words"]) == len(both["segments"]) == 2
    assert [bool(asked.word_timestamps) for asked in hearer.worker.asked] == [False, True, True]


async def test_fields_reach_the_worker(hearer: World) -> None:
    fields = {"language": "de", "prompt": "Mr. Dashwood", "temperature": "0.4", "keep_alive": "5m"}
    reply = await send(hearer, **fields, chunking_strategy="auto", user="me", stream="false")
    assert reply.status_code == 200
    (asked,) = hearer.worker.asked
    assert (asked.language, asked.prompt, asked.keep_alive_ms) == ("de", "Mr. Dashwood", 300_000)
    assert asked.temperature == pytest.approx(0.4)


async def test_empty_fields_are_absent_ones(hearer: World) -> None:
    reply = await send(hearer, language="", prompt="", temperature="", response_format="", stream="")
    assert reply.json()["text"] == SAID.decode()


async def test_a_translation_is_english_whatever_was_spoken(hearer: World) -> None:
    body = (await send(hearer, "/v1/audio/translations", response_format="verbose_json")).json()
    assert (body["task"], body["language"]) == ("translate", "english")
    assert hearer.worker.asked[0].task == hearing_pb2.TRANSCRIBE_TASK_TRANSLATE


def events_of(body: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]


async def test_a_stream_has_deltas_and_one_last_event_with_everything(hearer: World) -> None:
    reply = await send(hearer, stream="true")
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *deltas, done = events_of(reply.text)
    assert [event["type"] for event in deltas] == ["transcript.text.delta"] * 2
    assert "".join(event["delta"] for event in deltas) == done["text"] == SAID.decode()
    assert done["type"] == "transcript.text.done"
    assert done["usage"] == {"type": "tokens", "input_tokens": 50, "output_tokens": 4, "total_tokens": 54}
    assert "logprobs" not in done


async def test_logprobs_are_told_where_they_are_asked_for(hearer: World) -> None:
    body = (await send(hearer, include__="logprobs")).json()
    assert [item["logprob"] for item in body["logprobs"]] == [-0.5, -0.5]
    assert b"".join(bytes(item["bytes"]) for item in body["logprobs"]) == SAID
    *deltas, done = events_of((await send(hearer, include__="logprobs", stream="true")).text)
    assert [len(event["logprobs"]) for event in deltas] == [1, 1]
    assert len(done["logprobs"]) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "diarized_json"}, "response_format"),
        ({"temperature": "2"}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"stream": "maybe"}, "stream"),
        ({"timestamp_granularities__": "word"}, "timestamp_granularities[]"),
        ({"timestamp_granularities__": "letter", "response_format": "verbose_json"}, "timestamp_granularities[]"),
        ({"include__": "everything"}, "include[]"),
        ({"include__": "logprobs", "response_format": "srt"}, "include[]"),
        ({"stream": "true", "response_format": "srt"}, "stream"),
        ({"chunking_strategy": "never"}, "chunking_strategy"),
        ({"chunking_strategy": '{"type": "server_vad", "threshold": 0.2}'}, "chunking_strategy"),
        ({"known_speaker_names__": "Ann"}, "known_speaker_names"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"model": ""}, "model"),
        ({"prompt": "x" * 40_000}, "prompt"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(hearer: World, fields: dict[str, str], param: str) -> None:
    refused(await send(hearer, **fields), 400, param)
    assert not hearer.worker.asked


async def test_a_missing_file_an_empty_one_and_two_are_told_apart_from_good_ones(hearer: World) -> None:
    form = {"model": (None, MODEL)}
    refused(await hearer.client.post(PATH, files=form), 400, "file")
    refused(await send(hearer, data=b""), 400, "file")
    twice = [("model", (None, MODEL)), ("file", ("a", b"1")), ("file", ("b", b"2"))]
    refused(await hearer.client.post(PATH, files=twice), 400, "file")


async def test_a_file_over_25_megabytes_is_refused_whether_its_length_is_said_or_not(hearer: World) -> None:
    assert (await send(hearer, data=bytes(MAX_FILE_BYTES))).status_code == 200
    refused(await send(hearer, data=bytes(MAX_FILE_BYTES + 1)), 413, None)
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(64):
            sent += 1
            yield bytes(2**20)

    head = {"Content-Type": "multipart/form-data; boundary=B"}
    refused(await hearer.client.post(PATH, content=chunks(), headers=head), 413, None)


async def test_chunks_of_an_octet_stream_part_are_read_as_they_come(served: World) -> None:
    await publish(served)

    async def chunks() -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + MODEL.encode() + b"\r\n--"
        yield b'B\r\nContent-Disposition: form-data; name="file"; filename="5f0c.webm"\r\n'
        yield b"Content-Type: application/octet-stream\r\n\r\n"
        for byte in SAID:
            yield bytes([byte])
        yield b"\r\n--B"
        yield b"--\r\n"

    head = {"Content-Type": "multipart/form-data; boundary=B"}
    reply = await served.client.post(f"{served.url}{PATH}", content=chunks(), headers=head)
    assert reply.json()["text"] == SAID.decode()


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "application/json", 415),
        (b"", "multipart/form-data", 400),
        (b"nothing of the kind", "multipart/form-data; boundary=B", 400),
        (b"--B\r\n", "multipart/form-data; boundary=B", 400),
        (b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc', "multipart/form-data; boundary=B", 400),
        (
            b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\r\n--B--',
            "multipart/form-data; boundary=B",
            400,
        ),
        (b"--B\r\n" + b"X: y\r\n" * 100 + b"\r\nabc\r\n--B--", "multipart/form-data; boundary=B", 400),
        (
            b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 100 + b"--B--",
            "multipart/form-data; boundary=B",
            400,
        ),
        (
            b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 10**6 + b"\r\n--B--",
            "multipart/form-data; boundary=B",
            400,
        ),
    ],
)
async def test_a_malformed_form_is_a_client_error(hearer: World, body: bytes, kind: str, status: int) -> None:
    reply = await hearer.client.post(PATH, content=body, headers={"Content-Type": kind})
    assert (reply.status_code, sorted(reply.json()["error"])) == (status, ["code", "message", "param", "type"])


async def test_a_model_that_does_not_hear_is_refused_and_one_that_hears_does_not_chat(called: World) -> None:
    refused(await send(called), 400, "model")
    await publish(called)
    refused(await called.chat(), 400, "model")


async def test_the_workers_refusal_reaches_the_client_before_the_stream_and_within_it(hearer: World) -> None:
    async def refuse(request: pb.TranscribeRequest) -> AsyncIterator[pb.TranscribeResponse]:
        raise InvalidRequest("The file holds no sound.", param="file")
        yield pb.TranscribeResponse()

    async def break_off(request: pb.TranscribeRequest) -> AsyncIterator[pb.TranscribeResponse]:
        async for event in two_segments(request):
            yield event
            raise WorkerLost("The worker died.")

    hearer.worker.hearing = refuse
    refused(await send(hearer), 400, "file")
    refused(await send(hearer, stream="true"), 400, "file")
    hearer.worker.hearing = break_off
    assert (await send(hearer)).status_code >= 500
    delta, error = events_of((await send(hearer, stream="true")).text)
    assert (delta["type"], error["error"]["type"]) == ("transcript.text.delta", "server_error")


async def test_a_client_that_leaves_cancels_the_workers_call(served: World) -> None:
    await publish(served)

    async def wait(request: pb.TranscribeRequest) -> AsyncIterator[pb.TranscribeResponse]:
        await asyncio.Event().wait()
        yield pb.TranscribeResponse()

    served.worker.hearing = wait
    files = {"file": ("a.wav", SAID)}
    asking = asyncio.create_task(served.client.post(f"{served.url}{PATH}", data={"model": MODEL}, files=files))
    await served.worker.until_running(1)
    asking.cancel()
    await served.worker.until_running(0)


async def test_a_page_of_another_site_may_not_send_forms_unless_cors_allows_it() -> None:
    async with world(over_tcp=False, config={"cors": ["https://chat.example"]}) as here:
        await publish(here)
        files = {"file": ("a.wav", SAID)}
        for origin, status in (
            ("https://evil.example", 403),
            ("null", 403),
            ("https://chat.example", 200),
            ("http://localhost", 200),
        ):
            reply = await here.client.post(PATH, data={"model": MODEL}, files=files, headers={"Origin": origin})
            assert reply.status_code == status, origin


async def test_audio_models_are_listed_where_open_webui_looks_and_models_tell_what_they_do(hearer: World) -> None:
    text_model = route(name="org/other")
    heard = route(hearer.worker)
    heard.engine = lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION
    await hearer.publish(heard, text_model)
    body = (await hearer.client.get("/v1/audio/models")).json()
    assert [model["id"] for model in body["models"]] == [MODEL]
    assert body["data"] == body["models"]
    told = {model["id"]: model.get("task") for model in (await hearer.client.get("/v1/models")).json()["data"]}
    assert told == {MODEL: "automatic-speech-recognition", "org/other": None}


async def test_sound_for_a_model_that_reads_only_is_a_clear_refusal(called: World) -> None:
    part = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    reply = await called.client.post("/v1/chat/completions", json=body)
    refused(reply, 400, "messages[0].content[0]")
    assert "audio" in reply.json()["error"]["message"]

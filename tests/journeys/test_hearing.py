"""Speech to text through the real server with whisper-base, as the clients that people use send it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI

from tests.journeys.server import Server, Servers
from tests.kept import CannotFetch
from tests.models import clips
from tests.models.clips import Clip, aligned, encoded, wav, word_error_rate, words_of
from tests.models.real import pulled

pytestmark = [pytest.mark.journey, pytest.mark.real_model, pytest.mark.timeout(900)]

HEARER, WRITER = "whisper-base", "SmolLM2-135M-Instruct"
CONFIG = f"""\
gateways: 1
models:
  - name: {HEARER}
    preload: true
  - name: {WRITER}
"""
# The whole of what is promised takes ten minutes of sound; the usual run hears two and a half.
LONG = os.environ.get("HOSTLER_TEST_LONG") == "1"
LONG_S = 600.0 if LONG else 150.0


@pytest.fixture(scope="module")
def recordings() -> list[Clip]:
    try:
        return clips.librivox()
    except CannotFetch as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def hearing_server(module_servers: Servers, recordings: list[Clip], smollm2: Path) -> Server:
    assert recordings
    assert smollm2.is_dir()
    assert pulled(HEARER).is_dir()
    return module_servers(config=CONFIG, ready_within_s=240)


@pytest.fixture
def client(hearing_server: Server) -> OpenAI:
    return OpenAI(base_url=f"{hearing_server.url}/v1", api_key="none", timeout=600)


def test_the_openai_sdk_writes_down_what_is_read_in_every_container(client: OpenAI, recordings: list[Clip]) -> None:
    files = [
        ("a.wav", wav(recordings[0].samples)),
        ("a.mp3", encoded(recordings[1].samples, "mp3", "libmp3lame")),
        ("a.webm", encoded(recordings[2].samples, "webm", "libopus")),
        ("a.m4a", encoded(recordings[3].samples, "mp4", "aac")),
        ("a.flac", encoded(recordings[4].samples, "flac", "flac")),
        ("a.ogg", encoded(recordings[4].samples, "ogg", "libopus")),
    ]

    def ask(file: tuple[str, bytes]) -> Any:
        return client.audio.transcriptions.create(model=HEARER, file=file, language="en")

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(ask, files))
    said = " ".join(clip.text for clip in recordings)
    assert word_error_rate(said, " ".join(reply.text for reply in replies[:5])) <= 0.05
    assert words_of(replies[4].text) == words_of(replies[5].text)
    assert replies[0].usage.seconds == 8


def test_ten_minutes_are_heard_in_order_soon_and_with_the_right_times(client: OpenAI, recordings: list[Clip]) -> None:
    whole, starts = clips.joined(recordings, LONG_S)
    data = encoded(whole.samples, "mp3", "libmp3lame")
    began = time.monotonic()
    first_s, deltas, done = None, [], None
    stream = client.audio.transcriptions.create(model=HEARER, file=("long.mp3", data), stream=True)
    for event in stream:
        first_s = first_s or time.monotonic() - began
        if event.type == "transcript.text.delta":
            deltas.append(event.delta)
        else:
            done = event
    assert first_s is not None
    assert done is not None
    assert "".join(deltas).strip() == done.text  # type: ignore[union-attr]
    assert word_error_rate(whole.text, "".join(deltas)) <= 0.05
    verbose = client.audio.transcriptions.create(
        model=HEARER,
        file=("long.mp3", data),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert verbose.language == "english"
    assert verbose.duration == pytest.approx(whole.duration_s, abs=0.1)
    assert verbose.words is not None
    assert verbose.segments is not None
    heard = [(word, item.start) for item in verbose.words for word in words_of(item.word)]
    _, same = aligned(words_of(whole.text), [word for word, _ in heard])
    place_of, place = {}, 0
    for number, start in enumerate(starts):
        place_of[place] = start + recordings[number % len(recordings)].onset_s
        place += len(words_of(recordings[number % len(recordings)].text))
    errors = [heard[there][1] - place_of[here] for here, there in same if here in place_of]
    assert len(errors) >= len(starts) * 0.9
    # Every clip begins where it was joined: no error grows from window to window.
    assert np.abs(errors).max() <= 0.3 + 0.2, errors
    assert np.median(np.abs(errors)) <= 0.3
    ends = [segment.end for segment in verbose.segments]
    assert ends == sorted(ends)
    assert ends[-1] == pytest.approx(whole.duration_s, abs=1.0)
    assert first_s < 10


def test_subtitles_and_languages(hearing_server: Server, client: OpenAI, recordings: list[Clip]) -> None:
    file = ("a.wav", wav(recordings[0].samples))
    subtitles = client.audio.transcriptions.create(model=HEARER, file=file, response_format="srt")
    assert subtitles.startswith("1\n00:00:00,")
    assert word_error_rate(recordings[0].text, subtitles.splitlines()[2]) < 0.1
    try:
        french, text = clips.spoken("fr", "bonjour_monde")
    except CannotFetch as reason:
        pytest.skip(str(reason))
    verbose = client.audio.transcriptions.create(model=HEARER, file=("fr.wav", french), response_format="verbose_json")
    assert verbose.language == "french"
    assert word_error_rate(text, verbose.text) == 0
    english = client.audio.translations.create(model=HEARER, file=("fr.wav", french))
    assert words_of(english.text) == ["hello", "world"]
    listed = httpx.get(f"{hearing_server.url}/v1/audio/models", timeout=30).json()["models"]
    assert [model["id"] for model in listed] == [HEARER]


def test_a_prompt_spells_names_as_the_caller_does(client: OpenAI, recordings: list[Clip]) -> None:
    file = ("a.wav", wav(recordings[0].samples))
    reply = client.audio.transcriptions.create(
        model=HEARER, file=file, language="en", prompt="A novel about Mister Jon Dashwould and his family."
    )
    assert "Jon Dashwould" in reply.text or "Dashwould" in reply.text


@pytest.mark.parametrize(("name", "container", "codec"), [("wav", "wav", "pcm_s16le"), ("webm", "webm", "libopus")])
def test_open_webuis_upload_in_chunks_of_an_octet_stream_is_heard(
    hearing_server: Server, recordings: list[Clip], name: str, container: str, codec: str
) -> None:
    data = encoded(recordings[1].samples, container, codec)

    def chunks() -> Iterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + HEARER.encode() + b"\r\n--B\r\n"
        yield b'Content-Disposition: form-data; name="file"; filename="0b1c.' + name.encode() + b'"\r\n'
        yield b"Content-Type: application/octet-stream\r\n\r\n"
        for start in range(0, len(data), 16_384):
            yield data[start : start + 16_384]
        yield b"\r\n--B--\r\n"

    head = {"Content-Type": "multipart/form-data; boundary=B"}
    url = f"{hearing_server.url}/v1/audio/transcriptions"
    reply = httpx.post(url, content=chunks(), headers=head, timeout=300)
    assert word_error_rate(recordings[1].text, reply.json()["text"]) == 0


def test_bad_files_are_client_errors_and_the_server_hears_on(client: OpenAI, recordings: list[Clip]) -> None:
    def ask(data: bytes) -> str:
        return client.audio.transcriptions.create(model=HEARER, file=("a.wav", data), language="en").text

    for data in (b"text that calls itself sound", wav(recordings[0].samples)[:30], os.urandom(5000)):
        with pytest.raises(BadRequestError) as refused:
            ask(data)
        assert refused.value.param == "file"
    assert ask(wav(np.zeros(16_000 * 20, np.int16))) == ""
    good = ("a.wav", wav(recordings[4].samples))
    with pytest.raises(BadRequestError, match="does not write down speech"):
        client.audio.transcriptions.create(model=WRITER, file=good)
    with pytest.raises(BadRequestError, match="not a chat model"):
        client.chat.completions.create(model=HEARER, messages=[{"role": "user", "content": "hi"}])
    assert word_error_rate(recordings[4].text, ask(wav(recordings[4].samples))) == 0


def test_verbose_json_is_what_litellm_asks_for(hearing_server: Server, recordings: list[Clip]) -> None:
    reply = httpx.post(
        f"{hearing_server.url}/v1/audio/transcriptions",
        data={"model": HEARER, "response_format": "verbose_json"},
        files={"file": ("speech", wav(recordings[4].samples), "audio/wav")},
        timeout=300,
    )
    body = json.loads(reply.text)
    assert {"task", "language", "duration", "text", "segments", "usage"} <= set(body)
    assert body["segments"][0]["tokens"]
    assert -1 < body["segments"][0]["avg_logprob"] <= 0

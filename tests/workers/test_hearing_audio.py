"""Recordings to windows: every container, hostile files, pauses; and words' times. No model."""

from __future__ import annotations

import io
import itertools
import os
import struct
import wave
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostler.errors import InvalidRequest, Unavailable
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.clips import RATE_HZ, encoded, wav
from workers.hearing.audio import Unpacker
from workers.hearing.batching import Waiting, choose_joining
from workers.hearing.times import stretches_of
from workers.hearing.unpacking import MAX_SECONDS
from workers.hearing.voice import MAX_WINDOW_S, Cutter, Window
from workers.hearing.words import path_of, split_words


def tone(seconds: float, hz: float = 440.0) -> Any:
    time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return (8000 * np.sin(2 * np.pi * hz * time)).astype(np.int16)


async def unpacked(data: bytes) -> Any:
    unpacker = Unpacker()
    try:
        async with aclosing(unpacker.unpack(data)) as blocks:  # type: ignore[type-var]
            return np.concatenate([block async for block in blocks])
    finally:
        await unpacker.close()


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("wav", "pcm_s16le"),
        ("mp3", "libmp3lame"),
        ("webm", "libopus"),
        ("mp4", "aac"),
        ("flac", "flac"),
        ("ogg", "libopus"),
    ],
)
async def test_every_container_gives_the_sound_that_went_in(container: str, codec: str) -> None:
    samples = await unpacked(encoded(tone(2), container, codec))
    assert len(samples) / RATE_HZ == pytest.approx(2.0, abs=0.1)
    spectrum = np.abs(np.fft.rfft(samples[RATE_HZ // 2 : RATE_HZ * 3 // 2].astype(np.float64)))
    assert int(spectrum.argmax()) == pytest.approx(440, abs=1)
    assert np.abs(samples).max() == pytest.approx(8000, rel=0.15)


def playlist(target: Path) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{target}\n#EXT-X-ENDLIST\n".encode()


async def test_what_is_no_recording_is_refused_and_no_other_file_is_ever_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(tone(1)))
    whole = encoded(tone(3), "mp4", "aac")
    no_samples = wav(np.zeros(0, np.int16))
    for data in (
        b"x",
        b"RIFF but nothing of the kind" * 100,
        os.urandom(100_000),
        playlist(secret),
        f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\na=control:file://{secret}\n".encode(),
        whole[: len(whole) // 2],  # its index stands at the end
        no_samples,
    ):
        with pytest.raises(InvalidRequest) as refused:
            await unpacked(data)
        assert refused.value.param == "file"


async def test_what_is_cut_short_is_read_as_far_as_it_goes() -> None:
    for container, codec in (("wav", "pcm_s16le"), ("webm", "libopus"), ("mp3", "libmp3lame")):
        whole = encoded(tone(4), container, codec)
        samples = await unpacked(whole[: len(whole) // 2])
        assert 1.0 < len(samples) / RATE_HZ < 3.0, container


def slow_wav(num_samples: int) -> bytes:
    """Return a file of 8-bit samples at 1 Hz: each of its bytes is a second, 32,000 bytes of sound."""
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + num_samples, b"WAVE", b"fmt ", 16, 1, 1, 1, 1, 1, 8, b"data", num_samples
    )
    return header + b"\x80" * num_samples


async def test_a_small_file_that_holds_days_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(InvalidRequest, match="longer than"):
        await unpacked(slow_wav(MAX_SECONDS + 60))


async def test_an_hour_of_silence_has_no_windows_and_never_lies_in_memory_whole() -> None:
    unpacker, cutter, largest = Unpacker(), Cutter(), 0
    async with aclosing(unpacker.unpack(encoded_silence(3600))) as blocks:  # type: ignore[type-var]
        async for block in blocks:
            assert not cutter.feed(block)
            largest = max(largest, len(cutter._samples))
    assert not cutter.finish()
    assert cutter.duration_s == pytest.approx(3600, abs=1)
    assert largest < 10 * RATE_HZ
    await unpacker.close()


def encoded_silence(seconds: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 1, 1000, 0, "NONE", ""))
        file.writeframes(b"\x80" * (1000 * seconds))
    return buffer.getvalue()


async def test_a_reader_that_leaves_ends_the_process_and_a_killed_one_is_replaced() -> None:
    unpacker = Unpacker()
    blocks = unpacker.unpack(wav(tone(60)))
    assert len(await anext(blocks)) == 5 * RATE_HZ
    spare = unpacker._spare
    assert spare is not None
    await blocks.aclose()  # type: ignore[attr-defined]
    waiting = await spare
    waiting.kill()
    await waiting.wait()
    async with aclosing(unpacker.unpack(wav(tone(1)))) as again:  # type: ignore[type-var]
        assert sum([len(block) async for block in again]) == RATE_HZ
    await unpacker.close()
    with pytest.raises(Unavailable):
        await anext(unpacker.unpack(wav(tone(1))))


def cut(samples: Any, block_s: float = 5.0) -> list[Window]:
    cutter, step, windows = Cutter(), int(block_s * RATE_HZ), []
    for start in range(0, len(samples), step):
        windows += cutter.feed(samples[start : start + step])
    return [*windows, *cutter.finish()]


def speech_of(pattern: list[tuple[float, float]], seed: int = 0) -> Any:
    """Return noise of (seconds loud, seconds quiet) again and again, over a quiet room's noise."""
    random = np.random.default_rng(seed)
    parts = [
        random.normal(0, level, int(s * RATE_HZ)) for loud, quiet in pattern for level, s in ((4000, loud), (20, quiet))
    ]
    return np.concatenate(parts).astype(np.int16)


def test_windows_end_in_the_longest_pause_of_their_last_third() -> None:
    # Pauses of 0.3 s each 5 s, but 1 s after 25 s.
    pattern = [(4.7, 0.3)] * 4 + [(4.0, 1.0)] + [(4.7, 0.3)] * 4
    first, *_ = cut(speech_of(pattern))
    assert first.start_s == 0.0
    assert 24.0 < first.duration_s < 25.0


def test_who_never_pauses_is_cut_within_thirty_seconds_without_a_gap() -> None:
    windows = cut(speech_of([(100.0, 0.0)]))
    for one, next_one in itertools.pairwise(windows):
        assert one.start_s + one.duration_s == pytest.approx(next_one.start_s, abs=0.001)
    assert windows[-1].start_s + windows[-1].duration_s == pytest.approx(100, abs=0.05)
    assert all(20 <= window.duration_s <= MAX_WINDOW_S for window in windows[:-1])


def test_long_silences_are_left_out_and_times_stay_right() -> None:
    samples = speech_of([(0.0, 40.0), (3.0, 50.0), (2.0, 33.0)])
    windows = cut(samples)
    assert [(round(w.start_s), round(w.start_s + w.duration_s)) for w in windows] == [(40, 43), (93, 95)]
    assert all(0.2 < 40.0 - w.start_s < 0.4 for w in windows[:1])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.2, 40), st.floats(0.0, 20)), min_size=1, max_size=6),
    st.floats(0.5, 40),
    st.integers(0, 9),
)
def test_everything_loud_is_in_exactly_one_window(
    pattern: list[tuple[float, float]], block_s: float, seed: int
) -> None:
    samples = speech_of(pattern, seed)
    covered = np.zeros(len(samples), np.int8)
    for window in cut(samples, block_s):
        assert window.duration_s <= MAX_WINDOW_S
        start = round(window.start_s * RATE_HZ)
        assert np.array_equal(samples[start : start + len(window.samples)], window.samples)
        covered[start : start + len(window.samples)] += 1
    assert covered.max() <= 1
    loud = np.abs(samples.astype(np.int32)) > 2000
    assert covered[loud].mean() > 0.999


def test_first_windows_join_at_once_and_others_when_half_of_the_rows_are_free() -> None:
    def join(waiting: list[Waiting], running: int, first: int = 0) -> list[int]:
        return choose_joining(waiting, num_running=running, num_first_running=first, num_rows=8, at_most=2)

    one = [Waiting(1, index, True) for index in range(4)]
    assert join(one, 0) == [0]  # alone: the words that somebody waits for
    assert join(one[1:], 1, first=1) == []
    assert join(one[1:], 1) == [0, 1]
    assert join(one[1:], 5) == []
    assert join([*one[1:], Waiting(2, 0, False)], 7, first=1) == [3]
    assert join([Waiting(1, 5, True), Waiting(2, 1, True), Waiting(3, 1, False)], 0) == [1, 0]
    assert join(one, 8) == []


def test_segments_are_what_is_said_between_times_and_end_within_the_window() -> None:
    first, end = 100, 50

    def times(tokens: list[int]) -> list[tuple[float, float, tuple[int, ...]]]:
        return [(s.start_s, s.end_s, s.words) for s in stretches_of(tokens, first, end, 10.0)]

    assert times([100, 1, 2, 200, 200, 3, 300]) == [(0.0, 2.0, (1, 2)), (2.0, 4.0, (3,))]
    assert times([110, 1, 160, 210, 2]) == [(0.2, 1.2, (1,)), (2.2, 10.0, (2,))]
    assert times([1, 2]) == [(0.0, 10.0, (1, 2))]
    assert times([100, 1, 1600]) == [(0.0, 10.0, (1,))]
    assert times([100, 700]) == []


def test_the_cheapest_path_is_the_cheapest_of_all() -> None:
    random = np.random.default_rng(3)
    for rows, columns in ((1, 1), (1, 5), (4, 1), (3, 5), (5, 4)):
        costs = random.normal(size=(rows, columns)).astype(np.float32)

        def cheapest(row: int, column: int, costs: Any = costs) -> float:
            before = [(row - 1, column - 1), (row - 1, column), (row, column - 1)]
            options = [cheapest(i, j) for i, j in before if i >= 0 and j >= 0]
            return float(costs[row, column]) + (min(options) if options else 0.0)

        path = path_of(costs)
        assert (path[0][0], path[1][0], path[0][-1], path[1][-1]) == (0, 0, rows - 1, columns - 1)
        assert costs[path].sum() == pytest.approx(cheapest(rows - 1, columns - 1), abs=1e-5)


def test_words_keep_their_spaces_and_take_their_punctuation() -> None:
    pieces = [" He", " was", " ill", "-", "dis", "posed", ",", ' "', "not", '"', " 5", "%", "."]

    def text_of(ids: Any) -> str:
        return "".join(pieces[i] for i in ids)

    words = split_words(range(len(pieces)), text_of, "en")
    assert [text for text, _ in words] == [" He", " was", " ill", "-disposed,", ' "not"', " 5", "%."]
    assert sum(count for _, count in words) == len(pieces)
    halves = ["\ufffd", "你", "好", "。"]  # a character of two tokens is whole with the second

    def chinese(ids: Any) -> str:
        return halves[0] if list(ids) == [0] else "".join(halves[i] for i in ids if i)

    assert split_words(range(4), chinese, "zh") == [("你", 2), ("好。", 2)]

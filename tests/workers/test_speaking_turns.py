"""The speaking engine over a model that a test holds back: whose turn it is, who leaves, reads slowly or fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hostler.errors import HostlerError, Internal, Overloaded, Unavailable

from tests.workers.sounds import collected
from workers.engine import LoadSpec, ModelFacts
from workers.speaking.engine import MAX_UNREAD_BYTES, SpeakingEngine
from workers.speaking.models import Symbols, Waveform
from workers.utterances import SpeechEvent, SpeechFinish, SpeechRequest


def request(text: str) -> SpeechRequest:
    return SpeechRequest(text, format="pcm")


class HeldModel:
    """A model that says one second for each word when the test lets it, and remembers whom it spoke for."""

    sample_rate_hz, frame_samples, voices = 24_000, 240, ("it",)

    def __init__(self, *, free: bool = False) -> None:
        self.said: list[int] = []
        self.allowed = threading.Semaphore(10**6 if free else 0)
        self.speaking = threading.Semaphore(0)
        self.closed = False
        self.failures: dict[int, Exception] = {}

    def prepare(self) -> None: ...

    def read(self, text: str) -> list[Symbols]:
        return [(int(word.strip(".")),) for word in text.split()]

    def speak(self, symbols: Symbols, voice: int, speed: float) -> Waveform:
        self.speaking.release()
        assert self.allowed.acquire(timeout=10)
        self.said.append(symbols[0])
        if symbols[0] in self.failures:
            raise self.failures[symbols[0]]
        return np.zeros(24_000, np.float32)

    def close(self) -> None:
        self.closed = True

    async def until_speaking(self) -> None:
        assert await asyncio.to_thread(self.speaking.acquire, True, 10)


def held_engine(model: HeldModel, **fields: Any) -> SpeakingEngine:
    facts = ModelFacts("held", "speech", "Held", "float32", 0, voices=("it",))
    return SpeakingEngine(model, facts, replace(LoadSpec(model="held", path=""), **fields))


async def test_a_short_text_does_not_wait_for_the_end_of_a_long_one() -> None:
    model = HeldModel()
    engine = held_engine(model)
    long = asyncio.create_task(collected(engine.speak(request("1 1 1 1 1 1"))))
    await model.until_speaking()
    short = asyncio.create_task(collected(engine.speak(request("2 2"))))
    while engine.stats().num_queued == 0:
        await asyncio.sleep(0)
    model.allowed.release(8)
    await asyncio.gather(long, short)
    assert model.said == [1, 2, 1, 2, 1, 1, 1, 1]
    await engine.close()
    assert model.closed


async def test_sound_comes_while_the_rest_is_still_to_be_made() -> None:
    model = HeldModel()
    engine = held_engine(model)
    events = engine.speak(request("1 2"))
    model.allowed.release()
    first = await asyncio.wait_for(anext(events), 5)
    assert not isinstance(first, SpeechFinish)
    assert model.said == [1]
    model.allowed.release()
    assert [type(event) for event in [event async for event in events]][-1] is SpeechFinish
    await engine.close()


async def test_who_leaves_frees_the_engine_within_a_piece() -> None:
    model = HeldModel()
    engine = held_engine(model)
    leaver = asyncio.create_task(collected(engine.speak(request("1 1 1 1 1 1 1 1"))))
    await model.until_speaking()
    leaver.cancel()
    await asyncio.wait([leaver])
    assert (engine.stats().num_running, engine.stats().num_queued) == (0, 0)
    model.allowed.release(2)
    await collected(engine.speak(request("2")))
    assert model.said == [1, 2]
    await engine.close()


async def test_a_reader_who_is_behind_holds_nobody_else_up_and_costs_no_more_memory() -> None:
    model = HeldModel(free=True)
    engine = held_engine(model)
    slow: AsyncIterator[SpeechEvent] = engine.speak(request(" ".join(["1"] * 60)))
    await anext(slow)
    await collected(engine.speak(request("2 " * 20)))
    # A second is 48,000 bytes: the slow one has made what it may have unread, and a piece.
    assert 5 <= model.said.count(1) <= MAX_UNREAD_BYTES // 48_000 + 3
    data, finish = await collected(slow)
    assert model.said.count(1) == 60
    assert finish.duration_s == 60
    assert len(data) < 60 * 48_000
    await engine.close()


async def test_one_requests_failure_is_its_own() -> None:
    model = HeldModel(free=True)
    model.failures = {3: RuntimeError("broken"), 4: MemoryError()}
    engine = held_engine(model)
    good = asyncio.create_task(collected(engine.speak(request("1 1 1 1"))))
    for text, reason in (("2 3", "internal_error"), ("4", "out_of_memory")):
        with pytest.raises(HostlerError) as caught:
            await collected(engine.speak(request(text)))
        assert caught.value.reason == reason
    assert (await good)[1].duration_s == 4
    await engine.close()


async def test_numbers_that_are_none_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HeldModel(free=True)
    monkeypatch.setattr(model, "speak", lambda *_: np.full(100, np.nan, np.float32))
    engine = held_engine(model)
    with pytest.raises(Internal, match="valid"):
        await collected(engine.speak(request("1")))
    await engine.close()


async def test_more_than_may_wait_are_turned_away_and_a_close_ends_all() -> None:
    model = HeldModel()
    engine = held_engine(model, max_running=1, max_queued=1)
    tasks = [asyncio.create_task(collected(engine.speak(request(f"{n}")))) for n in (1, 2)]
    await model.until_speaking()
    with pytest.raises(Overloaded):
        await collected(engine.speak(request("3")))
    assert (engine.stats().num_running, engine.stats().num_queued) == (1, 1)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    model.allowed.release()
    await closing
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes[1:])
    with pytest.raises(Unavailable):
        await collected(engine.speak(request("4")))

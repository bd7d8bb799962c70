"""A line carries the events of many calls in order, a step's in one message, and never more than its client takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hostler.errors import Internal, InvalidRequest, Unavailable
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import line_pb2

from workers import lines as module
from workers.lines import Lines


def text(value: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(text=pb.TextDelta(text=value))


def on_line(call: int, name: str = "a") -> pb.GenerateRequest:
    return pb.GenerateRequest(line=line_pb2.Line(name=name, call=call))


async def words(*values: str, error: Exception | None = None) -> AsyncGenerator[pb.GenerateResponse, None]:
    for value in values:
        yield text(value)
        await asyncio.sleep(0)
    if error is not None:
        raise error


async def over_the_call(lines: Lines, request: pb.GenerateRequest, *values: str) -> list[str]:
    return [event.text.text async for event in lines.carry(request, words(*values))]


class Reader:
    """Follows a line from the beginning."""

    def __init__(self, lines: Lines, name: str = "a") -> None:
        self.messages: list[pb.FollowResponse] = []
        self.go = asyncio.Event()
        self.go.set()
        self.task = asyncio.create_task(self._read(lines, name))

    async def _read(self, lines: Lines, name: str) -> None:
        async with aclosing(lines.follow(name)) as messages:
            async for message in messages:
                self.messages.append(message)
                await self.go.wait()

    def told(self, call: int) -> list[str | None]:
        """Return the texts of a call, None for its end."""
        items = [item for message in self.messages for item in message.events if item.call == call]
        return [item.event.text.text if item.HasField("event") else None for item in items]


async def test_without_a_line_events_come_over_the_call() -> None:
    assert await over_the_call(Lines(), pb.GenerateRequest(), "a", "b") == ["a", "b"]


async def test_what_calls_say_at_the_same_time_comes_in_one_message_and_nothing_over_the_calls() -> None:
    lines = Lines()
    reader = Reader(lines)
    said = await asyncio.gather(*(over_the_call(lines, on_line(n), *map(str, range(10))) for n in range(8)))
    await asyncio.sleep(0.01)
    assert said == [[]] * 8
    for call in range(8):
        assert reader.told(call) == [*map(str, range(10)), None]
    assert len(reader.messages) <= 2 * 11, "11 turns of 8 calls"
    lines.end()
    await reader.task


async def test_a_failed_call_has_told_what_came_before_and_that_nothing_follows() -> None:
    lines = Lines()
    reader = Reader(lines)
    with pytest.raises(Internal):
        async for _ in lines.carry(on_line(5), words("a", error=Internal("no"))):
            pass
    await asyncio.sleep(0.01)
    assert reader.told(5) == ["a", None]
    lines.end()
    await reader.task


async def test_the_order_of_naming_and_following_does_not_matter() -> None:
    lines = Lines()
    calling = asyncio.create_task(over_the_call(lines, on_line(1), "a"))
    await asyncio.sleep(0.01)
    reader = Reader(lines)
    assert await calling == []
    await asyncio.sleep(0.01)
    assert reader.told(1) == ["a", None]
    lines.end()
    await reader.task


async def test_a_call_on_a_line_that_nobody_follows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FOLLOWED_WITHIN_S", 0.02)
    lines = Lines()
    with pytest.raises(Unavailable, match="follow"):
        await over_the_call(lines, on_line(1), "a")
    assert lines._lines == {}


@pytest.mark.parametrize("name", ["a", ""])
async def test_a_line_has_a_name_and_one_reader(name: str) -> None:
    lines = Lines()
    reader = Reader(lines)
    await asyncio.sleep(0)
    with pytest.raises(InvalidRequest, match="name"):
        async for _ in lines.follow(name):
            pass
    assert not reader.task.done()
    lines.end()
    await reader.task
    assert lines._lines == {}


async def test_calls_wait_for_a_slow_reader_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_EVENTS", 4)
    lines = Lines()
    reader = Reader(lines)
    reader.go.clear()
    wanted = [str(number) for number in range(100)]
    calling = asyncio.create_task(over_the_call(lines, on_line(1), *wanted))
    await asyncio.sleep(0.05)
    assert len(lines._lines["a"].waiting) == 4
    assert not calling.done()
    reader.go.set()
    await calling
    await asyncio.sleep(0.01)
    assert reader.told(1) == [*wanted, None]
    assert max(len(message.events) for message in reader.messages) == 4
    lines.end()
    await reader.task


async def test_a_prompts_logprobs_travel_alone() -> None:
    async def echo() -> AsyncGenerator[pb.GenerateResponse, None]:
        yield pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(tokens=[pb.TokenLogprob(token_id=1)]))

    lines = Lines()
    reader = Reader(lines)

    async def scored(call: int) -> None:
        async for _ in lines.carry(on_line(call), echo()):
            pass

    await asyncio.gather(*(scored(call) for call in range(3)))
    await asyncio.sleep(0.01)
    for message in reader.messages:
        kinds = [item.event.WhichOneof("event") for item in message.events]
        assert "prompt_logprobs" not in kinds[1:]
    assert sum(len(message.events) for message in reader.messages) == 6
    lines.end()
    await reader.task


async def test_a_reader_that_leaves_takes_its_line_along() -> None:
    lines = Lines()
    reader = Reader(lines)
    await over_the_call(lines, on_line(1), "a")
    reader.task.cancel()
    await asyncio.gather(reader.task, return_exceptions=True)
    assert lines._lines == {}

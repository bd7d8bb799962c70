"""Generations at a worker over one line: each ends as its own call does, and what breaks the line costs no reply."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import grpc
import pytest
from hostler.channel import call_metadata, open_channel
from hostler.errors import Internal, Overloaded, WorkerLost, from_rpc_error
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import line_pb2
from hostler.inference.v1.inference_pb2_grpc import InferenceServiceStub

from gateway.line import Line
from tests.gateway.fakes import FakeWorker, finish, text

META = call_metadata(request_id="r", generation=7)


class Called(FakeWorker):
    """A worker that counts its lines and can break them."""

    num_lines = 0
    broken: asyncio.Event

    async def Follow(self, request: line_pb2.FollowRequest, context: object) -> AsyncIterator[pb.FollowResponse]:  # noqa: N802
        self.num_lines += 1
        breaking = asyncio.create_task(self.broken.wait())
        messages = self.lines.follow(request.line)
        while True:
            coming = asyncio.ensure_future(anext(messages))
            await asyncio.wait({coming, breaking}, return_when=asyncio.FIRST_COMPLETED)
            if breaking.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")  # type: ignore[attr-defined]
            yield await coming


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Called]:
    made = Called(tmp_path)
    made.broken = asyncio.Event()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def line(worker: Called) -> AsyncIterator[Line]:
    channel = open_channel(worker.address)
    yield Line(InferenceServiceStub(channel))
    await channel.close()


async def said(line: Line, heard: list[str] | None = None) -> list[str]:
    heard = [] if heard is None else heard
    async for event in line.generate(pb.GenerateRequest(text="x"), META):
        heard.append(event.text.text)
    return heard


async def test_many_generations_share_one_line_and_each_gets_its_own(worker: Called, line: Line) -> None:
    async def echo(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        for number in range(20):
            yield text(f"{request.text}{number} ")
            await asyncio.sleep(0.001)
        yield finish()

    async def ask(name: str) -> str:
        request = pb.GenerateRequest(text=name)
        return "".join([event.text.text async for event in line.generate(request, META)])

    worker.script = echo
    names = [chr(ord("a") + number) for number in range(16)]
    replies = await asyncio.gather(*map(ask, names))
    assert replies == ["".join(f"{name}{number} " for number in range(20)) for name in names]
    assert worker.num_lines == 1


@pytest.mark.parametrize("num_words", [0, 1, 30])
async def test_a_failure_comes_after_all_that_was_said_before_it(worker: Called, line: Line, num_words: int) -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        for _ in range(num_words):
            yield text("w")
        raise Overloaded("full", retry_after_s=3)

    worker.script = fail
    for _ in range(20):
        heard: list[str] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await said(line, heard)
        assert heard == ["w"] * num_words
        error = from_rpc_error(caught.value)
        assert isinstance(error, Overloaded)
        assert error.retry_after_s == 3


async def test_an_end_without_a_finish_is_a_lost_worker(worker: Called, line: Line) -> None:
    async def stop(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield text("half")

    worker.script = stop
    with pytest.raises(WorkerLost, match="before it was finished"):
        await said(line)


async def test_who_leaves_is_noticed_by_the_worker_and_the_others_go_on(worker: Called, line: Line) -> None:
    async def tick(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        for _ in range(50):
            yield text("t")
            await asyncio.sleep(0.005)
        yield finish()

    worker.script = tick
    staying = asyncio.create_task(said(line))
    leaving = line.generate(pb.GenerateRequest(text="x"), META)
    await anext(leaving)
    await worker.until_running(2)
    await leaving.aclose()
    await worker.until_running(1)
    assert len(await staying) == 51


async def test_a_broken_line_fails_its_calls_at_once_and_the_next_call_opens_another(
    worker: Called, line: Line
) -> None:
    async def hang(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield text("a")
        await asyncio.sleep(60)

    async def say(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield text("b")
        yield finish()

    worker.script = hang
    hanging = [asyncio.create_task(said(line)) for _ in range(3)]
    await worker.until_running(3)
    worker.broken.set()
    async with asyncio.timeout(5):
        failures = await asyncio.gather(*hanging, return_exceptions=True)
    assert [type(from_rpc_error(f)) for f in failures if isinstance(f, grpc.RpcError)] == [WorkerLost] * 3
    await worker.until_running(0)
    worker.broken.clear()
    worker.script = say
    assert await said(line) == ["b", ""]
    assert worker.num_lines == 2


async def test_a_worker_that_is_away_is_lost_and_not_waited_for(worker: Called, line: Line) -> None:
    await worker.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            await said(line)
    assert isinstance(from_rpc_error(caught.value), WorkerLost)


async def test_a_call_that_only_its_own_failure_ends_does_not_hang(worker: Called, line: Line) -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        raise Internal("no")
        yield

    # As a worker that fails before it has looked at the line.
    async def before_the_line(request: pb.GenerateRequest, generated: AsyncGenerator[pb.GenerateResponse, None]):  # type: ignore[no-untyped-def]
        async for event in generated:
            yield event

    worker.script = fail
    worker.lines.carry = before_the_line  # type: ignore[method-assign]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            await said(line)
    assert isinstance(from_rpc_error(caught.value), Internal)

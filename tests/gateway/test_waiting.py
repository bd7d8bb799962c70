"""Waiting well: bounded by number and bytes, told how far it is, turned away with a time that was measured."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from hostler.config import HostlerConfig
from hostler.errors import Overloaded
from hostler.inference.v1 import inference_pb2 as pb
from hostler.placement.v1 import placement_pb2

from gateway.progress import progress_words
from gateway.services import max_waiting_of
from gateway.waiting import MAX_RETRY_S, UNKNOWN_LOAD_S, Bounds, WaitingRoom
from tests.gateway.fakes import MODEL, QUICK, World, echo, finish, route, text, world

MIB = 2**20


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(room: WaitingRoom, model: str = "m", num_bytes: int = 1, max_waiting: int = 2) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        room.enter(model, num_bytes, max_waiting)
    return caught.value


def test_only_so_many_wait_for_one_model(clock: Clock) -> None:
    room = WaitingRoom(clock=clock)
    with room.enter("m", 1, 2), room.enter("m", 1, 2):
        assert "2 requests already wait for the model 'm'" in refusal(room).message
        with room.enter("other", 1, 2):
            pass
    with room.enter("m", 1, 1):
        assert room.num_waiting("m") == 1
    assert room.num_waiting("m") == 0


def test_whoever_has_begun_waits_no_more(clock: Clock) -> None:
    room = WaitingRoom(clock=clock)
    with room.enter("m", 5, 1) as place:
        place.begin()
        place.begin()
        with room.enter("m", 5, 1):
            assert room.num_waiting("m") == 1
    assert room.num_waiting("m") == 0


def test_only_so_many_bytes_wait_for_one_model_and_in_all(clock: Clock) -> None:
    room = WaitingRoom(Bounds(max_bytes=25 * MIB, max_model_bytes=16 * MIB), clock)
    with ExitStack() as stack:
        stack.enter_context(room.enter("m", 10 * MIB, 99))
        assert "10.0 MiB" in refusal(room, num_bytes=8 * MIB, max_waiting=99).message
        stack.enter_context(room.enter("m", 2 * MIB, 99))
        stack.enter_context(room.enter("other", 10 * MIB, 99))
        assert "on this server" in refusal(room, "third", 8 * MIB, 99).message
    with room.enter("m", 400 * MIB, 99):
        pass  # alone it may be as large as it likes: another bound has let it in


def test_a_load_with_a_known_end_says_when_to_come_back(clock: Clock) -> None:
    room = WaitingRoom(clock=clock)
    with room.enter("m", 1, 1):
        room.loading("m", eta_ms=12_000)
        clock.now += 2
        error = refusal(room, max_waiting=1)
        assert error.retry_after_s == 10.0
        assert "which is being loaded. Try again in about 10 s." in error.message
        clock.now += 60
        assert refusal(room, max_waiting=1).retry_after_s == 1.0
        room.loading("m", eta_ms=7000)
        room.loading("m")  # another one begins to wait, and knows nothing yet
        assert refusal(room, max_waiting=1).retry_after_s == 7.0


def test_a_load_without_one_takes_as_long_again_as_it_has_taken(clock: Clock) -> None:
    room = WaitingRoom(clock=clock)
    with room.enter("m", 1, 1):
        room.loading("m", eta_ms=0)
        assert refusal(room, max_waiting=1).retry_after_s == UNKNOWN_LOAD_S
        clock.now += 40
        assert refusal(room, max_waiting=1).retry_after_s == 40.0
        clock.now += 10**6
        assert refusal(room, max_waiting=1).retry_after_s == MAX_RETRY_S


def test_a_queue_that_moves_says_when_half_of_it_will_have_begun(clock: Clock) -> None:
    room = WaitingRoom(clock=clock)
    with ExitStack() as stack:
        places = [stack.enter_context(room.enter("m", 1, 99)) for _ in range(30)]
        room.loading("m", eta_ms=1000)
        clock.now += 100  # the load is no measure of the queue
        for place in places[:10]:
            room.ready("m")
            clock.now += 2.0
            place.begin()
        assert refusal(room, max_waiting=20).retry_after_s == pytest.approx(20 / 2 * 2.0)
        clock.now += 20.0  # it has stopped moving, which counts as well
        assert refusal(room, max_waiting=20).retry_after_s == pytest.approx(20 / 2 * 4.0)


def test_a_queue_that_had_to_wait_for_a_load_again_is_measured_anew(clock: Clock) -> None:
    room = WaitingRoom(clock=clock)
    with ExitStack() as stack:
        places = [stack.enter_context(room.enter("m", 1, 99)) for _ in range(30)]
        for place in places[:20]:
            clock.now += 0.01
            place.begin()
        room.loading("m", eta_ms=50_000)
        clock.now += 50
        room.ready("m")
        clock.now += 30
        assert room.retry_after_s("m") == 30.0


def test_only_the_latest_starts_count(clock: Clock) -> None:
    room = WaitingRoom(clock=clock)
    with ExitStack() as stack:
        places = [stack.enter_context(room.enter("m", 1, 999)) for _ in range(200)]
        for number, place in enumerate(places[:150]):
            clock.now += 60.0 if number < 50 else 1.0
            place.begin()
        left_s = room.retry_after_s("m")
        assert left_s is not None
        assert left_s == pytest.approx(50 / 2 * 1.0, rel=0.05)
    assert room.retry_after_s("m") is None


def test_as_many_may_wait_as_the_workers_take() -> None:
    models = [{"name": "a", "max_running": 4, "max_queued": 6, "max_replicas": 2}]
    max_waiting = max_waiting_of(HostlerConfig.model_validate({"models": models}))
    assert (max_waiting("a"), max_waiting("found on disk")) == (20, 16 + 256)


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        ({"stage": "queue", "num_ahead": 2, "eta_ms": 42_000}, "waiting for memory, 2 models ahead, about 42 s left"),
        ({"stage": "queue", "num_ahead": 1, "detail": "a is busy"}, "waiting for memory, 1 model ahead, a is busy"),
        (
            {"stage": "read", "done_bytes": 2**30, "total_bytes": 2**32, "eta_ms": 3600},
            "reading weights 25% of 4.0 GiB, about 4 s left",
        ),
        ({"stage": "wake"}, "waking up"),
        ({}, "starting"),
        ({"stage": "something new"}, "something new"),
    ],
)
def test_progress_is_told_in_words(progress: dict[str, Any], words: str) -> None:
    assert progress_words(placement_pb2.EnsureProgress(**progress)) == words


async def wait_for_ever(model: str) -> AsyncIterator[placement_pb2.EnsureProgress]:
    yield placement_pb2.EnsureProgress(stage="queue", num_ahead=3, eta_ms=30_000)
    await asyncio.Event().wait()


async def test_a_full_queue_turns_away_at_once_with_the_time_that_is_left() -> None:
    models = [{"name": MODEL, "max_running": 1, "max_queued": 1}]
    async with world(config={"models": models}) as here:
        here.placement.ensure = wait_for_ever
        await here.publish(route())
        asked = [asyncio.create_task(here.chat("x", stream=number == 0)) for number in range(2)]
        await here.placement.until_waiting(2)
        for stream in (False, True):
            reply = await here.chat("x", stream=stream)
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
            assert 25 <= int(reply.headers["retry-after"]) <= 30
        assert len(here.placement.ensured) == 2
        for task in asked:
            task.cancel()
        await here.placement.until_waiting(0)
        here.placement.ensure = lambda model: one_replica(here)
        assert (await here.chat("x")).status_code == 200


async def one_replica(here: World) -> AsyncIterator[placement_pb2.Replica]:
    yield here.worker.replica()


async def test_of_ten_times_as_many_all_are_served_or_turned_away_and_none_is_lost() -> None:
    models = [{"name": MODEL, "max_running": 2, "max_queued": 4}]
    async with world(config={"models": models}) as here:
        gate = asyncio.Event()

        async def load(model: str) -> AsyncIterator[placement_pb2.EnsureProgress | placement_pb2.Replica]:
            yield placement_pb2.EnsureProgress(stage="read", eta_ms=3000)
            await gate.wait()
            yield here.worker.replica()

        here.placement.ensure = load
        await here.publish(route())
        asked = [asyncio.create_task(here.chat(f"number {number}")) for number in range(60)]
        turned_away = 0
        for reply in asyncio.as_completed(asked):
            turned_away += (await reply).status_code == 429
            if turned_away == 54:
                break
        gate.set()
        replies = await asyncio.gather(*asked)
        served = {n: reply for n, reply in enumerate(replies) if reply.status_code == 200}
        assert len(served) == 6
        for number, reply in served.items():
            assert reply.json()["choices"][0]["message"]["content"] == f"number {number}"
        # 5 s until the orchestrator has said how long the load takes.
        assert {reply.headers["retry-after"] for reply in replies if reply.status_code == 429} <= {"3", "5"}
        assert here.app.state.services.dispatcher._room.num_waiting(MODEL) == 0


async def test_every_choice_of_a_request_takes_a_place_and_gives_it_back() -> None:
    async with world(config={"models": [{"name": MODEL, "max_running": 1, "max_queued": 1}]}) as here:
        assert (await here.chat("x", n=3)).status_code == 429
        assert here.app.state.services.dispatcher._room.num_waiting(MODEL) == 0
        assert (await here.chat("x", n=2)).status_code == 200


async def test_a_load_that_outlasts_all_patience_says_how_long_it_will_still_take() -> None:
    async with world(patience=replace(QUICK, ensure_s=0.2)) as here:
        here.placement.ensure = wait_for_ever
        await here.publish(route())
        reply = await here.chat("x")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_load_failed")
        assert reply.headers["retry-after"] == "30"


async def test_who_has_a_first_token_takes_no_place_from_those_who_come() -> None:
    async with world(config={"models": [{"name": MODEL, "max_running": 1, "max_queued": 0}]}) as here:
        gate = asyncio.Event()

        async def speak_then_wait(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
            yield text("begun")
            await gate.wait()
            yield finish()

        here.worker.script = speak_then_wait
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
        async with here.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if "begun" in line:
                    break
            here.worker.script = echo
            assert (await here.chat("second")).status_code == 200
            gate.set()


async def test_once_the_model_is_up_its_load_tells_nothing_any_more() -> None:
    async with world(config={"models": [{"name": MODEL, "max_running": 1, "max_queued": 0}]}) as here:
        gate = asyncio.Event()

        async def load(model: str) -> AsyncIterator[placement_pb2.EnsureProgress | placement_pb2.Replica]:
            yield placement_pb2.EnsureProgress(stage="read", eta_ms=90_000)
            yield here.worker.replica()

        async def hold(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
            await gate.wait()
            yield finish()

        here.placement.ensure, here.worker.script = load, hold
        await here.publish(route())
        first = asyncio.create_task(here.chat("first"))
        await here.worker.until_running(1)
        assert (await here.chat("second")).headers["retry-after"] == "1"
        gate.set()
        assert (await first).status_code == 200


async def test_batch_work_leaves_places_for_those_whom_people_wait_for() -> None:
    models = [{"name": MODEL, "max_running": 1, "max_queued": 3}]
    async with world(config={"models": models}) as here:
        here.placement.ensure = wait_for_ever
        await here.publish(route())
        asked = [asyncio.create_task(here.chat("x")) for _ in range(3)]
        await here.placement.until_waiting(3)
        assert (await here.chat("x", service_tier="flex")).status_code == 429
        asked.append(asyncio.create_task(here.chat("x")))
        await here.placement.until_waiting(4)
        for task in asked:
            task.cancel()


async def test_a_stream_that_waits_tells_its_place_and_the_time_left(served: World) -> None:
    async def load(model: str) -> AsyncIterator[placement_pb2.EnsureProgress | placement_pb2.Replica]:
        yield placement_pb2.EnsureProgress(stage="queue", num_ahead=3, eta_ms=30_000)
        await asyncio.sleep(0.1)
        yield placement_pb2.EnsureProgress(stage="wake")
        await asyncio.sleep(0.1)
        yield served.worker.replica()

    served.placement.ensure = load
    await served.publish(route())
    reply = await served.chat("x", stream=True)
    comments = [line for line in reply.text.splitlines() if line.startswith(":")]
    assert comments[0] == ": loading: waiting for memory, 3 models ahead, about 30 s left"
    assert ": loading: waking up" in comments


async def test_of_a_burst_of_progress_only_the_latest_is_told() -> None:
    async with world(patience=replace(QUICK, comment_gap_s=0.2, ping_s=5)) as here:

        async def load(model: str) -> AsyncIterator[placement_pb2.EnsureProgress | placement_pb2.Replica]:
            for done in range(1, 101):
                yield placement_pb2.EnsureProgress(stage="read", done_bytes=done, total_bytes=100)
                await asyncio.sleep(0.001)
            yield placement_pb2.EnsureProgress(stage="warm-up")
            await asyncio.sleep(0.5)
            yield here.worker.replica()

        here.placement.ensure = load
        await here.publish(route())
        reply = await here.chat("x", stream=True)
        comments = [line for line in reply.text.splitlines() if line.startswith(":")]
        assert len(comments) <= 5
        assert comments[-1] == ": loading: warming up"


async def test_a_full_worker_says_when_to_come_back_from_what_was_measured(served: World) -> None:
    gate = asyncio.Event()

    async def hold_or_refuse(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if served.worker.num_running > 1:
            raise Overloaded("The queue is full.")
        await gate.wait()
        yield finish()

    served.worker.script = hold_or_refuse
    waiting = asyncio.create_task(served.chat("first"))
    await served.worker.until_running(1)
    room = served.app.state.services.dispatcher._room
    room._queues[MODEL].busy_since -= 50  # it has waited so long, and nobody has begun
    reply = await served.chat("second")
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "51")
    gate.set()
    assert (await waiting).status_code == 200


async def test_a_full_replica_is_passed_over_while_another_has_room(served: World) -> None:
    other = await served.add_worker("b")
    await served.publish(route(served.worker, other))

    async def refuse(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise Overloaded("The queue is full.")
        yield

    served.worker.script, other.script = refuse, echo
    replies = [await served.chat("still here") for _ in range(6)]
    assert {reply.status_code for reply in replies} == {200}
    assert served.placement.ensured == []
    other.script = refuse
    assert (await served.chat("x")).status_code == 429

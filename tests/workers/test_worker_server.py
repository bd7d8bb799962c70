"""A worker process as the gateway and the orchestrator see it: over its socket, with the scripted engine."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from hostler.channel import call_metadata, open_channel
from hostler.errors import HostlerError, Internal, StaleGeneration, UnsupportedParameter, WorkerLost, from_rpc_error
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import inference_pb2_grpc
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.lifecycle.v1 import lifecycle_pb2_grpc

from workers.scripted import expected_reply

META = call_metadata(request_id="r1", generation=3)


class Worker:
    """A started worker with a loaded scripted model."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, channel: grpc.aio.Channel, log: Path) -> None:
        self.process, self.socket, self.log = process, socket, log
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.lifecycle = lifecycle_pb2_grpc.LifecycleServiceStub(channel)

    def generate(
        self, text: str, **fields: object
    ) -> grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]:
        message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])
        request = pb.GenerateRequest(chat=pb.Chat(messages=[message]), **fields)  # type: ignore[arg-type]
        return self.inference.Generate(request, metadata=META)

    async def outcomes_of_calls(self, num_calls: int) -> list[str]:
        """Return how the calls so far ended, as the log has it."""
        async with asyncio.timeout(5):
            while (
                len(lines := [line for line in self.log.read_text().splitlines() if "inference call" in line])
                < num_calls
            ):
                await asyncio.sleep(0.02)
        assert all(" request_id='r1' call='generate' " in line for line in lines)
        return [line.split("outcome='")[1].split("'")[0] for line in lines]

    async def watch_until(self, running: int) -> life.WatchResponse:
        async with asyncio.timeout(5):
            async for state in self.lifecycle.Watch(life.WatchRequest(interval_ms=5000)):
                if state.num_running == running:
                    return state
        raise AssertionError("the watch ended")


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    socket = tmp_path / "w.sock"
    command = [sys.executable, "-m", "workers", "--socket", str(socket), "--generation", "3"]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = await asyncio.to_thread(subprocess.Popen, command, stderr=stderr)
    channel = open_channel(f"unix:{socket}")
    try:
        await asyncio.wait_for(channel.channel_ready(), 20)
        started = Worker(process, socket, channel, log)
        request = life.LoadRequest(model="echo", engine=life.ENGINE_KIND_SCRIPTED, max_running=2, max_queued=1)
        events = [e async for e in started.lifecycle.Load(request, metadata=META)]
        assert events[-1].ready.model == "echo"
        yield started
    finally:
        await channel.close()
        process.kill()
        process.wait(10)
        sys.stderr.write(log.read_text())  # shown if the test fails


async def text_of(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> str:
    return "".join([event.text.text async for event in call])


async def failure_of(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> HostlerError:
    async def read_all() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all()
    return from_rpc_error(caught.value)


async def test_a_reply_is_exactly_what_the_script_says(worker: Worker) -> None:
    reply = await text_of(worker.generate("hello", sampling=pb.Sampling(seed=9), max_tokens=20))
    assert reply == expected_reply("hello", 9, "r1", 20)


async def test_progress_comes_first_and_only_to_those_who_want_it(worker: Worker) -> None:
    wanted = [e async for e in worker.generate("one two", max_tokens=2, wants_progress=True)]
    assert [e.WhichOneof("event") for e in wanted] == ["progress", "text", "text", "finish"]
    assert wanted[0].progress.num_prompt_tokens == wanted[-1].finish.usage.num_prompt_tokens == 2
    plain = [e async for e in worker.generate("one two", max_tokens=2)]
    assert [e.WhichOneof("event") for e in plain] == ["text", "text", "finish"]


async def test_two_requests_with_one_id_both_get_their_answer(worker: Worker) -> None:
    replies = await asyncio.gather(text_of(worker.generate("one")), text_of(worker.generate("two")))
    assert list(replies) == [expected_reply("one", 0, "r1", 16), expected_reply("two", 0, "r1", 16)]


async def test_a_call_that_leaves_frees_its_slot(worker: Worker) -> None:
    call = worker.generate("[[tokens=100000]] [[delay_ms=5]]")
    await call.read()
    await worker.watch_until(running=1)
    call.cancel()
    await worker.watch_until(running=0)


async def test_a_message_of_another_generation_is_refused(worker: Worker) -> None:
    request = pb.GenerateRequest(text="x")
    call = worker.inference.Generate(request, metadata=call_metadata(generation=2))
    assert isinstance(await failure_of(call), StaleGeneration)


async def test_a_failure_in_mid_stream_arrives_with_its_reason(worker: Worker) -> None:
    assert isinstance(await failure_of(worker.generate("[[fail_at=3]]")), Internal)


async def test_what_would_change_the_answer_and_is_not_there_is_refused_by_name(worker: Worker) -> None:
    error = await failure_of(worker.generate("x", constraint=pb.Constraint(json_object=True)))
    assert isinstance(error, UnsupportedParameter)
    assert error.param == "response_format"


async def test_a_worker_that_dies_in_mid_stream_is_told_as_lost(worker: Worker) -> None:
    error = await failure_of(worker.generate("[[die_at=3]] [[delay_ms=1]]"))
    assert isinstance(error, WorkerLost)


async def test_a_frozen_worker_is_noticed_within_three_seconds(worker: Worker) -> None:
    call = worker.generate("[[tokens=100000]] [[delay_ms=5]]")
    await call.read()
    started = asyncio.get_running_loop().time()
    worker.process.send_signal(signal.SIGSTOP)
    assert isinstance(await failure_of(call), WorkerLost)
    assert asyncio.get_running_loop().time() - started < 3.0


async def test_unload_answers_and_ends_the_process(worker: Worker) -> None:
    await worker.lifecycle.Unload(life.UnloadRequest(), metadata=META)
    assert await asyncio.to_thread(worker.process.wait, 10) == 0
    assert not worker.socket.exists()


async def test_draining_refuses_new_requests_and_waits_for_the_old(worker: Worker) -> None:
    call = worker.generate("[[tokens=40]] [[delay_ms=10]]")
    await call.read()
    draining = asyncio.ensure_future(worker.lifecycle.Drain(life.DrainRequest(deadline_ms=5000), metadata=META))
    assert (await draining).num_remaining == 0
    assert (await failure_of(worker.generate("late"))).http_status == 503


async def test_the_socket_is_private(worker: Worker) -> None:
    assert stat.S_IMODE(os.stat(worker.socket).st_mode) == 0o600


async def test_the_log_says_under_the_requests_id_how_each_call_ended(worker: Worker) -> None:
    await text_of(worker.generate("a secret plan"))
    assert await worker.outcomes_of_calls(1) == ["served"]
    await failure_of(worker.generate("[[fail_at=2]]"))
    leaving = worker.generate("[[delay_ms=200]]")
    await leaving.read()
    leaving.cancel()
    assert await worker.outcomes_of_calls(3) == ["served", "internal_error", "cancelled"]
    assert "secret" not in worker.log.read_text()

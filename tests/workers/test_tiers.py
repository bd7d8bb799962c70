"""A worker's tiers as the orchestrator sees them: claimed, asleep, awake, resized. Real processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from hostler.channel import call_metadata, open_channel
from hostler.errors import HostlerError, ModelLoadFailed, StaleGeneration, Unavailable, from_rpc_error
from hostler.inference.v1 import inference_pb2 as pb
from hostler.inference.v1 import inference_pb2_grpc
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.lifecycle.v1 import lifecycle_pb2_grpc

from orchestrator.store import footprint
from workers.scripted import expected_reply

META = call_metadata(request_id="r1", generation=3)
TEXT, SCRIPTED = life.ENGINE_KIND_TEXT, life.ENGINE_KIND_SCRIPTED
MiB = 2**20


class Worker:
    """A blank worker process, as one is started ahead."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.lifecycle = lifecycle_pb2_grpc.LifecycleServiceStub(channel)

    async def load(self, engine: life.EngineKind.ValueType, path: object = "", **fields: object) -> None:
        options = {"max_running": 4, "max_queued": 16, "num_threads": 1, **fields}
        request = life.LoadRequest(model="m", engine=engine, path=str(path), **options)  # type: ignore[arg-type]
        async for _ in self.lifecycle.Load(request, metadata=META):
            pass

    def generate(
        self, text: str, max_tokens: int = 12, **fields: object
    ) -> grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]:
        sampling = pb.Sampling(temperature=0.0, ignore_eos=True)
        request = pb.GenerateRequest(text=text, sampling=sampling, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
        return self.inference.Generate(request, metadata=META)

    async def reply(self, text: str, max_tokens: int = 12, **fields: object) -> str:
        return "".join([event.text.text async for event in self.generate(text, max_tokens, **fields)])

    async def sleep(self, deadline_ms: int = 5000) -> life.SleepResponse:
        return await self.lifecycle.Sleep(life.SleepRequest(deadline_ms=deadline_ms), metadata=META)

    async def wake(self, kv_cache_bytes: int = 0) -> None:
        await self.lifecycle.Wake(life.WakeRequest(devices=["cpu"], kv_cache_bytes=kv_cache_bytes), metadata=META)

    async def resize(self, kv_cache_bytes: int) -> int:
        request = life.ResizeRequest(kv_cache_bytes=kv_cache_bytes)
        return (await self.lifecycle.Resize(request, metadata=META)).kv_cache_bytes

    async def report(self) -> life.WatchResponse:
        async for report in self.lifecycle.Watch(life.WatchRequest()):
            return report
        raise AssertionError("the watch ended")


@asynccontextmanager
async def started(directory: Path, preload: bool = False) -> AsyncIterator[Worker]:
    socket = directory / "w.sock"
    arguments = f"['-m', '--socket', {str(socket)!r}, '--generation', '0']"
    script = f"import sys; sys.argv = {arguments}; from workers.__main__ import main; main()"
    command = [sys.executable, "-c", ("import workers.preload; " if preload else "") + script]
    process = await asyncio.to_thread(subprocess.Popen, command)
    channel = open_channel(f"unix:{socket}")
    try:
        await asyncio.wait_for(channel.channel_ready(), 60)
        yield Worker(channel)
    finally:
        await channel.close()
        process.kill()
        process.wait(10)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    async with started(tmp_path) as blank:
        yield blank


async def refused(call: object) -> HostlerError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return from_rpc_error(caught.value)


async def test_two_loads_race_for_a_blank_worker_and_one_wins(worker: Worker) -> None:
    assert (await worker.report()).generation == 0

    async def load(generation: int) -> int:
        request = life.LoadRequest(model=f"m{generation}", engine=SCRIPTED, max_running=1)
        async for _ in worker.lifecycle.Load(request, metadata=call_metadata(generation=generation)):
            pass
        return generation

    outcomes = await asyncio.gather(load(7), load(8), return_exceptions=True)
    (won,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
    (lost,) = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert isinstance(from_rpc_error(lost), StaleGeneration)
    report = await worker.report()
    assert (report.generation, report.info.model) == (won, f"m{won}")
    stale = worker.lifecycle.Sleep(life.SleepRequest(), metadata=call_metadata(generation=15 - won))
    assert isinstance(await refused(stale), StaleGeneration)


async def test_an_engine_that_keeps_nothing_sleeps_and_wakes_all_the_same(worker: Worker) -> None:
    await worker.load(SCRIPTED)
    await worker.sleep()
    report = await worker.report()
    assert (report.state, report.info.model, report.device_bytes) == (life.WORKER_STATE_ASLEEP, "m", 0)
    assert isinstance(await refused(worker.generate("hello").read()), Unavailable)
    assert (await worker.sleep()).freed_bytes == 0
    await worker.wake()
    assert await worker.reply("hello") == expected_reply("hello", 0, "r1", 12)
    assert isinstance(await refused(worker.wake()), Unavailable)


async def test_who_sleeps_waits_for_running_requests_but_not_beyond_the_deadline(worker: Worker) -> None:
    await worker.load(SCRIPTED)
    call = worker.generate("[[delay_ms=5]]", 100_000)
    await call.read()
    assert isinstance(await refused(worker.sleep(deadline_ms=50)), Unavailable)
    assert (await worker.report()).state == life.WORKER_STATE_READY
    assert await worker.reply("meanwhile") == expected_reply("meanwhile", 0, "r1", 12)
    sleeping = asyncio.create_task(worker.sleep())
    while (await worker.report()).state != life.WORKER_STATE_DRAINING:
        await asyncio.sleep(0)
    assert isinstance(await refused(worker.generate("late").read()), Unavailable)
    call.cancel()
    await sleeping
    assert (await worker.report()).state == life.WORKER_STATE_ASLEEP


async def test_the_newest_request_says_how_long_to_stay_up(worker: Worker) -> None:
    await worker.load(SCRIPTED)
    assert not (await worker.report()).HasField("keep_alive_ms")
    await worker.reply("x", keep_alive_ms=-1)
    assert (await worker.report()).keep_alive_ms == -1
    await worker.reply("x")
    assert not (await worker.report()).HasField("keep_alive_ms")


async def test_a_text_model_wakes_with_the_same_replies_and_another_cache(worker: Worker, tiny_model: Path) -> None:
    await worker.load(TEXT, tiny_model)
    before = await worker.reply("def main", 40)
    await worker.sleep()
    asleep = await worker.report()
    assert (asleep.device_bytes, asleep.kv_reserved_bytes, asleep.kv_allocated_bytes) == (0, 0, 0)
    assert asleep.host_bytes > 0
    block = 16 * asleep.info.kv_bytes_per_token
    await worker.wake(kv_cache_bytes=20 * block)
    assert await worker.reply("def main", 40) == before
    awake = await worker.report()
    assert awake.kv_reserved_bytes == 20 * block
    assert 0 < awake.kv_allocated_bytes <= awake.kv_reserved_bytes
    assert awake.peak_device_bytes >= awake.device_bytes > 0


async def test_a_resize_tells_what_became_of_it(worker: Worker, tiny_model: Path) -> None:
    await worker.load(TEXT, tiny_model)
    block = 16 * (await worker.report()).info.kv_bytes_per_token
    assert await worker.resize(30 * block + 5) == 30 * block
    assert (await worker.report()).kv_reserved_bytes == 30 * block
    call = worker.generate("x", 300)
    await call.read()
    assert await worker.resize(block) == 19 * block  # the prompt's token and 300 more
    call.cancel()
    assert await worker.resize(2**60) == 4 * 256 * block  # everybody's whole context


async def test_files_that_changed_during_sleep_fail_the_wake_by_name(
    worker: Worker, tiny_model: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    await worker.load(TEXT, path)
    await worker.sleep()
    os.utime(path / "model.safetensors", ns=(1, 1))
    error = await refused(worker.wake())
    assert isinstance(error, ModelLoadFailed)
    assert "changed while it slept" in error.message
    report = await worker.report()
    assert report.state == life.WORKER_STATE_FAILED
    assert "changed" in report.failure


@pytest.mark.real_model
async def test_a_sleeping_models_memory_goes_back_to_the_system(tmp_path: Path, smollm2: Path) -> None:
    async with started(tmp_path, preload=True) as worker:
        await worker.load(TEXT, smollm2)
        before = await worker.reply("The capital of France is")
        weights = (await worker.report()).info.weight_bytes
        for _ in range(2):
            freed = (await worker.sleep()).freed_bytes
            asleep = await worker.report()
            assert freed > 0.9 * weights
            assert asleep.resident_bytes < 480 * MiB
            assert psutil.Process(asleep.pid).memory_info().rss == pytest.approx(asleep.resident_bytes, rel=0.02)
            await worker.wake(64 * MiB)
            assert await worker.reply("The capital of France is") == before


@pytest.mark.parametrize("quantize", ["", "int8"])
async def test_the_estimate_before_the_first_load_is_right_within_a_tenth(
    tmp_path: Path, tiny_model: Path, quantize: str
) -> None:
    await estimate_holds(tmp_path, tiny_model, quantize)


@pytest.mark.real_model
@pytest.mark.parametrize("quantize", ["", "int8"])
async def test_the_estimate_of_a_real_model_is_right_within_a_tenth(
    tmp_path: Path, smollm2: Path, quantize: str
) -> None:
    await estimate_holds(tmp_path, smollm2, quantize)


async def estimate_holds(directory: Path, model: Path, quantize: str) -> None:
    expected = footprint(model, "auto", quantize)
    async with started(directory, preload=True) as worker:
        await worker.load(TEXT, model, quantize=quantize)
        await worker.reply("hello", 4)
        report = await worker.report()
    measured = report.device_bytes - report.kv_allocated_bytes
    assert expected.weight_bytes + expected.workspace_bytes == pytest.approx(measured, rel=0.1)

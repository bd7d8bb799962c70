"""A worker on a TCP port: who may call it, and where it listens. A real server and real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import psutil
import pytest
from hostler.channel import WORKER_KEY_KEY, open_channel, worker_key
from hostler.inference.v1 import inference_pb2, inference_pb2_grpc
from hostler.lifecycle.v1 import lifecycle_pb2, lifecycle_pb2_grpc

from workers.server import serve

KEY = worker_key("a run's token", "w1")


@pytest.fixture
async def target() -> AsyncIterator[str]:
    serving: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve("127.0.0.3:0", 1, "w1", key=KEY, on_serving=serving.set_result))
    yield await serving
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def first_report(target: str, key: str, *, metadata: tuple[tuple[str, str], ...] = ()) -> int:
    async with open_channel(target, key) as channel:
        call = lifecycle_pb2_grpc.LifecycleServiceStub(channel).Watch(
            lifecycle_pb2.WatchRequest(), metadata=metadata, timeout=10
        )
        async for report in call:
            return report.generation
    raise AssertionError("no report")


async def test_who_has_the_key_is_served(target: str) -> None:
    assert await first_report(target, KEY) == 1


@pytest.mark.parametrize(
    "key", ["", KEY[:-1], KEY + "0", worker_key("a run's token", "w2"), worker_key("another token", "w1")]
)
async def test_a_call_without_the_key_never_reaches_the_worker(target: str, key: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as stream:
        await first_report(target, key)
    assert stream.value.code() == grpc.StatusCode.UNAUTHENTICATED
    async with open_channel(target, key) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await inference_pb2_grpc.InferenceServiceStub(channel).Tokenize(inference_pb2.TokenizeRequest(), timeout=10)
    assert unary.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert KEY not in str(unary.value)


async def test_a_key_of_strange_characters_is_refused_and_breaks_nothing(target: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await first_report(target, "", metadata=((WORKER_KEY_KEY, "~" * 4000),))
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert await first_report(target, KEY) == 1


async def test_it_listens_on_its_own_address_alone(target: str) -> None:
    port = int(target.rpartition(":")[2])
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening if address.port == port} <= {"127.0.0.3", "::ffff:127.0.0.3"}
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_without_a_key_it_does_not_listen_on_tcp() -> None:
    with pytest.raises(ValueError, match="wants a key"):
        await serve("127.0.0.1:0", 1, "w1")

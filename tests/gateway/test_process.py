"""The gateway as a process of its own: what it loads, how it inherits its socket, how it stops."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hostler.config import HostlerConfig, write_resolved
from hostler.inference.v1 import inference_pb2 as pb

from tests.gateway.event_frames import sse_data
from tests.gateway.fake_placement import FakePlacement
from tests.gateway.fakes import MODEL, FakeWorker, finish, route, text


async def test_the_gateway_loads_no_torch_no_ray_and_no_transformers() -> None:
    code = "import gateway.app, gateway.server, sys; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert output.strip() == b"set()"


@dataclass
class Running:
    process: asyncio.subprocess.Process
    client: httpx.AsyncClient
    worker: FakeWorker
    unix: Path


@asynccontextmanager
async def gateway_process(drain_s: float, **config: Any) -> AsyncIterator[Running]:
    directory = Path(tempfile.mkdtemp(prefix="hgw-"))
    placement, worker = FakePlacement(directory), FakeWorker(directory)
    await placement.start()
    await worker.start()
    await placement.publish(route(worker))
    write_resolved(HostlerConfig(drain_s=drain_s, **config), directory / "config.json")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(directory / "gateway.sock"))
    unix.listen()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "--run-dir", str(directory), "--fd", str(listener.fileno())),
        *("--unix-fd", str(unix.fileno())),
        pass_fds=(listener.fileno(), unix.fileno()),
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ},
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield Running(process, client, worker, directory / "gateway.sock")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        listener.close()
        unix.close()
        await asyncio.gather(placement.stop(), worker.stop())
        shutil.rmtree(directory, ignore_errors=True)


async def test_the_unix_socket_has_the_same_application_keys_and_allowed_names() -> None:
    async with gateway_process(drain_s=1, api_key="sesame-sesame") as running:
        transport = httpx.AsyncHTTPTransport(uds=str(running.unix))
        key = {"Authorization": "Bearer sesame-sesame"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:18000", timeout=20) as client:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 401
            reply = await client.post("/v1/chat/completions", json=body, headers=key)
            assert reply.json()["choices"][0]["message"]["content"]
            evil = await client.get("/v1/models", headers={**key, "Host": "evil.example"})
            assert evil.status_code == 403
        running.process.terminate()
        assert await asyncio.wait_for(running.process.wait(), 20) == 0
        assert running.unix.exists()  # it is the supervisor's: the next gateway accepts there


async def test_sigterm_lets_running_streams_finish_and_exits_with_0() -> None:
    gate = asyncio.Event()

    async def wait(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("begun")
        await gate.wait()
        yield text(" and finished")
        yield finish(2)

    async with gateway_process(drain_s=10) as running:
        running.worker.script = wait
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
        async with running.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            seen = ""
            async for piece in reply.aiter_text():
                if '"begun"' in piece:
                    running.process.send_signal(signal.SIGTERM)
                    running.process.send_signal(signal.SIGINT)
                    asyncio.get_running_loop().call_later(0.3, gate.set)
                seen += piece
        assert sse_data(seen)[-1] == "[DONE]"
        assert await asyncio.wait_for(running.process.wait(), 5) == 0


async def test_what_outlasts_the_drain_gets_an_error_event_and_the_exit_is_still_0() -> None:
    async def hang(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("begun")
        await asyncio.Event().wait()

    async with gateway_process(drain_s=0.2) as running:
        running.worker.script = hang
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
        async with running.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            seen = ""
            async for piece in reply.aiter_text():
                if '"begun"' in piece:
                    running.process.send_signal(signal.SIGTERM)
                seen += piece
        assert orjson.loads(sse_data(seen)[-1])["error"]["code"] == "unavailable"
        await running.worker.until_running(0)
        assert await asyncio.wait_for(running.process.wait(), 5) == 0


async def test_one_that_has_a_successor_accepts_no_more_and_gives_streams_longer_than_a_stop_would() -> None:
    gate = asyncio.Event()

    async def wait(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("begun")
        await gate.wait()
        yield text(" and finished")
        yield finish(2)

    async with gateway_process(drain_s=0.1, reload_drain=60) as running:
        running.worker.script = wait
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
        assert (await running.client.get("/health")).headers.get("connection") != "close"
        async with running.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            seen = ""
            async for piece in reply.aiter_text():
                if '"begun"' in piece:
                    running.process.send_signal(signal.SIGUSR1)
                    await asyncio.sleep(0.3)
                    # Nobody accepts now, but what is connected already gets its last answer.
                    with pytest.raises(httpx.TimeoutException):
                        async with httpx.AsyncClient(base_url=running.client.base_url, timeout=0.3) as late:
                            await late.get("/health")
                    asyncio.get_running_loop().call_later(2.5, gate.set)
                seen += piece
        assert sse_data(seen)[-1] == "[DONE]"
        assert await asyncio.wait_for(running.process.wait(), 5) == 0


async def test_a_connection_gets_its_last_answer_from_one_that_has_a_successor() -> None:
    async with gateway_process(drain_s=0.1) as running:
        assert (await running.client.get("/health")).status_code == 200
        running.process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(0.2)
        last = await running.client.get("/health")
        assert (last.status_code, last.headers["connection"]) == (200, "close")
        assert await asyncio.wait_for(running.process.wait(), 10) == 0


async def test_a_stop_shortens_what_a_reload_has_granted() -> None:
    async def hang(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("begun")
        await asyncio.Event().wait()

    async with gateway_process(drain_s=0.2, reload_drain=600) as running:
        running.worker.script = hang
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
        async with running.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            seen = ""
            async for piece in reply.aiter_text():
                if '"begun"' in piece:
                    running.process.send_signal(signal.SIGUSR1)
                    await asyncio.sleep(1.5)
                    running.process.send_signal(signal.SIGTERM)
                seen += piece
        assert orjson.loads(sse_data(seen)[-1])["error"]["code"] == "unavailable"
        assert await asyncio.wait_for(running.process.wait(), 10) == 0

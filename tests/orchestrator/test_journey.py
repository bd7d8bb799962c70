"""A real Ray head, a real orchestrator and real scripted workers, through deaths and a restart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from hostler.channel import open_channel
from hostler.config import build, write_resolved
from hostler.placement.v1 import placement_pb2 as pb
from hostler.placement.v1 import placement_pb2_grpc
from hostler.rundir import RunDir

pytestmark = [pytest.mark.journey, pytest.mark.timeout(170)]

MODELS = [
    {"name": "echo", "engine": "scripted", "preload": True, "kv_cache": "300MB"},
    {"name": "other", "engine": "scripted", "kv_cache": "300MB"},
]


class Server:
    """Ray head and orchestrator as `hostler serve` starts them."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = RunDir(directory)
        config = build({"models": MODELS, "devices": [{"id": "cpu", "budget": "500MB"}], "drain_s": 2})
        write_resolved(config, self.run_dir.config)
        self.head = self.start("orchestrator.ray_head")
        self.orchestrator = self.start("orchestrator")
        self.channel = open_channel(self.run_dir.orchestrator_target)
        self.stub = placement_pb2_grpc.PlacementServiceStub(self.channel)

    def start(self, module: str) -> subprocess.Popen[bytes]:
        with open(self.run_dir.path / f"{module}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, "--run-dir", str(self.run_dir.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def ensure(self, model: str) -> pb.Replica:
        call = self.stub.EnsureModel(pb.EnsureModelRequest(model=model), wait_for_ready=True, timeout=60)
        async for event in call:
            if event.HasField("ready"):
                return event.ready
        raise AssertionError("no ready event")

    async def routes(self) -> AsyncIterator[dict[str, pb.ModelRoute]]:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for table in self.stub.WatchRoutes(pb.WatchRoutesRequest(), wait_for_ready=True):
                    yield {route.name: route for route in table.models}
            await asyncio.sleep(0.05)

    async def until(self, generation_above: int, model: str = "echo", within_s: float = 30) -> pb.Replica:
        """Wait until the route table shows a replica of a later generation."""
        async with asyncio.timeout(within_s):
            async for table in self.routes():
                if model in table and (new := [r for r in table[model].replicas if r.generation > generation_above]):
                    return new[0]
        raise AssertionError

    async def status(self) -> pb.GetStatusResponse:
        return await self.stub.GetStatus(pb.GetStatusRequest(), wait_for_ready=True, timeout=30)

    async def pid(self, model: str) -> int:
        async with asyncio.timeout(10):
            while True:
                for replica in (await self.status()).replicas:
                    if replica.model == model and replica.worker.pid:
                        return replica.worker.pid
                await asyncio.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        found = []
        for process in (self.head, self.orchestrator):
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    async def close(self) -> None:
        await self.channel.close(None)
        family = self.family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        for child in (self.head, self.orchestrator):
            child.wait(10)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ho-", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
async def server(directory: Path) -> AsyncIterator[Server]:
    server = Server(directory)
    try:
        yield server
    finally:
        await server.close()


def listening(processes: list[psutil.Process]) -> list[Any]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return found


async def test_workers_survive_the_orchestrator_and_are_replaced_when_they_die(server: Server) -> None:
    first = await server.ensure("echo")
    pid = await server.pid("echo")

    # Nothing listens beyond loopback, and the secret is private.
    addresses = {address.ip for address in listening(server.family())}
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert (server.run_dir.path / "ray.json").stat().st_mode & 0o077 == 0

    # The orchestrator is killed: the next one adopts the living worker.
    server.orchestrator.kill()
    server.orchestrator.wait(10)
    server.orchestrator = server.start("orchestrator")
    adopted = await server.until(0, within_s=20)
    assert (adopted.id, adopted.generation) == (first.id, first.generation)
    assert await server.pid("echo") == pid

    # The worker is frozen: fenced, killed, replaced.
    os.kill(pid, signal.SIGSTOP)
    replaced = await server.until(first.generation, within_s=15)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    # The worker is killed: replaced.
    os.kill(await server.pid("echo"), signal.SIGKILL)
    again = await server.until(replaced.generation, within_s=15)

    # Another model takes the room: echo is evicted.
    async with asyncio.timeout(40):
        other = await server.ensure("other")
    assert other.generation > again.generation
    reply = await server.stub.UnloadModel(pb.UnloadModelRequest(model="other"), timeout=20)
    assert reply.num_unloaded == 1

    # Full stop: exit 0, no worker left.
    await server.ensure("echo")
    last = await server.pid("echo")
    server.orchestrator.terminate()
    assert await asyncio.to_thread(server.orchestrator.wait, 20) == 0
    assert not psutil.pid_exists(last) or psutil.Process(last).status() == psutil.STATUS_ZOMBIE
    family = server.family()
    server.head.terminate()
    assert await asyncio.to_thread(server.head.wait, 10) == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


async def test_when_ray_dies_both_processes_say_so_and_leave_nothing(server: Server) -> None:
    await server.ensure("echo")
    family = server.family()
    gcs = next(p for p in family if "gcs_server" in p.name())
    gcs.kill()
    assert await asyncio.to_thread(server.head.wait, 15) == 3
    assert await asyncio.to_thread(server.orchestrator.wait, 15) == 3
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []

    # A new Ray and a new orchestrator serve again, under a later generation.
    server.head = server.start("orchestrator.ray_head")
    server.orchestrator = server.start("orchestrator")
    assert (await server.until(1, within_s=60)).generation > 1

"""Other machines: what they are called, how they join, what happens when they are gone. Real sockets, a fake Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostler
import pytest
from hostler.channel import worker_key
from hostler.config import ConfigError, HostlerConfig, build
from hostler.errors import WorkerLost
from hostler.rundir import RunDir

from orchestrator import devices, nodes, ray_nodes, ray_session
from orchestrator.devices import Device
from orchestrator.elsewhere import Elsewhere
from orchestrator.models import ModelSpec
from orchestrator.node_agent import NodeAgent
from orchestrator.nodes import Machine, NodesSeen, RemoteWorker
from orchestrator.process_id import ProcessId
from orchestrator.ray_nodes import RayNodes

from .conftest import MB

Start = Callable[..., Any]


def machine(name: str = "", hostname: str = "gpu-box.lan", address: str = "10.0.0.2") -> Machine:
    return Machine("id", name, hostname, address, 1234)


# ------------------------------------------------------------ names and configuration


@pytest.mark.parametrize(
    ("given", "hostname", "taken", "name"),
    [
        ("Box 2", "h", (), "box-2"),
        ("", "GPU-Box.lan", (), "gpu-box"),
        ("", "gpu-box", ("gpu-box",), "gpu-box-10.0.0.2"),
        ("", "", (), "10.0.0.2"),
    ],
)
def test_a_machine_is_called_as_it_was_named_else_as_its_host(
    given: str, hostname: str, taken: tuple[str, ...], name: str
) -> None:
    assert nodes.name_for(machine(given, hostname), taken) == name


def test_a_machine_that_ray_names_after_its_address_has_no_name_of_its_own() -> None:
    row = {"NodeID": "f", "NodeName": "10.0.0.2", "NodeManagerAddress": "10.0.0.2", "NodeManagerPort": 7}
    assert nodes.machine_of({**row, "NodeManagerHostname": "h"}) == Machine("f", "", "h", "10.0.0.2", 7)


def test_an_ipv6_address_is_bracketed() -> None:
    assert nodes.host_port("fd00::2", 0) == "[fd00::2]:0"


def test_devices_are_configured_for_the_machine_that_their_name_begins_with() -> None:
    configured = build({"devices": [{"id": "cpu"}, {"id": "box2/cuda:1", "kind": "cuda"}, {"id": "box2/cpu"}]}).devices
    assert [d.id for d in devices.configured_on("", configured)] == ["cpu"]
    assert [(d.id, d.kind) for d in devices.configured_on("box2", configured)] == [("cuda:1", "cuda"), ("cpu", "cpu")]
    assert devices.configured_on("box3", configured) == ()


@pytest.mark.parametrize("device_id", ["/cpu", "a/b/cpu", "Box/cpu", "box/", "../cpu"])
def test_a_device_with_a_strange_machine_stops_the_start(device_id: str) -> None:
    with pytest.raises(ConfigError):
        build({"devices": [{"id": device_id}]})


def test_a_gpu_elsewhere_is_pinned_by_its_own_number() -> None:
    gpu = devices.seen_from_elsewhere(Device("cuda:3", "cuda", "H100", 0, 10), "box2", 8)
    assert (gpu.id, gpu.node, gpu.local_id, gpu.num_cores) == ("box2/cuda:3", "box2", "cuda:3", 8)
    assert devices.worker_env([gpu], 8)["CUDA_VISIBLE_DEVICES"] == "3"


# ------------------------------------------------------------ tokens


def test_every_process_of_a_run_gets_the_same_token_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    token = RunDir(tmp_path).token()
    assert RunDir(tmp_path).token() == token
    assert len(bytes.fromhex(token)) == 32
    assert RunDir(tmp_path).token_file.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


def test_a_worker_key_opens_one_worker_of_one_run() -> None:
    keys = {worker_key(token, worker) for token in ("t1", "t2") for worker in ("w1", "w2")}
    assert len(keys) == 4


def test_a_clusters_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray_session.cluster_token({}) == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    (tmp_path / "other").write_text("file\n")
    assert ray_session.cluster_token({}) == "home"
    assert ray_session.cluster_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}) == "file"
    assert ray_session.cluster_token({"RAY_AUTH_TOKEN": "variable"}) == "variable"


# ------------------------------------------------------------ joining and leaving


class Reference:
    """What a call of a Ray actor returns: a future that another thread may fill."""

    def __init__(self, work: Any) -> None:
        self._future: Future[Any] = Future()
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Future[Any]) -> None:
        if (error := task.exception()) is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(task.result())

    def future(self) -> Future[Any]:
        return self._future


class FakeActor:
    """Our agent, run right here."""

    def __init__(self, ray: FakeRay, ray_id: str, models_dir: str | None) -> None:
        self._ray, self._ray_id, self._agent = ray, ray_id, NodeAgent(models_dir)

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if method in self._ray.hanging:
                await asyncio.Event().wait()
            answer = await getattr(self._agent, method)(*arguments)
            return {**answer, **self._ray.answers.get(self._ray_id, {})} if method == "describe" else answer

        return SimpleNamespace(remote=lambda *arguments: Reference(call(*arguments)))


class FakeRay:
    """The calls of Ray that finding nodes takes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, Exception] = {}
        self.hanging: set[str] = set()
        self.sockets: dict[str, socket.socket] = {}
        self.util = SimpleNamespace(
            scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda ray_id, soft: (ray_id, soft))
        )

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here")

    def nodes(self) -> list[dict[str, Any]]:
        return self.rows

    def remote(self, actor_class: type[NodeAgent]) -> Any:
        assert actor_class is NodeAgent
        loop = asyncio.get_running_loop()

        def options(*, scheduling_strategy: tuple[str, bool], **others: Any) -> Any:
            ray_id, soft = scheduling_strategy
            assert not soft
            if ray_id in self.errors:
                raise self.errors[ray_id]
            return SimpleNamespace(remote=lambda models_dir: FakeActor(self, ray_id, models_dir))

        assert loop.is_running()
        return SimpleNamespace(options=options)

    def add(self, name: str, ray_id: str = "") -> None:
        """List a node and open its raylet's port."""
        self.sockets[name] = listener = socket.create_server(("127.0.0.1", 0))
        row = {"NodeID": ray_id or f"id-{name}", "Alive": True, "NodeName": name, "NodeManagerHostname": "h"}
        self.rows.append({**row, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": listener.getsockname()[1]})

    def reopen(self, name: str) -> None:
        """Open the port of a node again, as when a cut cable is mended."""
        port = next(row["NodeManagerPort"] for row in self.rows if row["NodeName"] == name)
        self.sockets[name] = socket.create_server(("127.0.0.1", port))


class Watched:
    """A `RayNodes` whose reports are collected."""

    def __init__(self, ray: FakeRay, config: HostlerConfig) -> None:
        async def connected() -> FakeRay:
            return ray

        self.nodes = RayNodes(config, connected)
        self.reports: asyncio.Queue[NodesSeen] = asyncio.Queue()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with contextlib.aclosing(self.nodes.watch()) as reports:  # type: ignore[type-var]
            async for seen in reports:
                self.reports.put_nowait(seen)

    async def next(self) -> NodesSeen:
        async with asyncio.timeout(10):
            return await self.reports.get()


CONFIG = build({"devices": [{"id": "box2/cpu", "budget": 10 * MB}, {"id": "box3/cpu", "budget": 20 * MB}]})


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    monkeypatch.setattr(ray_nodes, "POLL_S", 0.02)
    monkeypatch.setattr(ray_nodes, "REJOIN_AFTER_S", 0.05)
    return FakeRay()


@pytest.fixture
async def watch(ray: FakeRay) -> AsyncIterator[Callable[[], Watched]]:
    started: list[Watched] = []

    def begin() -> Watched:
        started.append(Watched(ray, CONFIG))
        return started[-1]

    yield begin
    for one in started:
        one.task.cancel()
        await asyncio.gather(one.task, return_exceptions=True)
    for listener in ray.sockets.values():
        listener.close()


async def test_the_first_report_holds_the_machines_that_are_there_with_their_devices(
    ray: FakeRay, watch: Callable[[], Watched]
) -> None:
    ray.add("box2")
    ray.add("box3")
    ray.add("elsewhere", ray_id="here")  # Ourselves.
    ray.rows.append({**ray.rows[0], "NodeID": "dead", "Alive": False})
    seen = await watch().next()
    assert {(d.id, d.node, d.budget_bytes) for d in seen.devices} == {
        ("box2/cpu", "box2", 10 * MB),
        ("box3/cpu", "box3", 20 * MB),
    }
    assert set(seen.joined) == set(seen.sleep_budget_bytes) == {"box2", "box3"}
    assert seen.left == ()


async def test_a_cluster_of_one_machine_is_reported_at_once(ray: FakeRay, watch: Callable[[], Watched]) -> None:
    watched = watch()
    assert await watched.next() == NodesSeen()
    ray.add("box2")
    seen = await watched.next()
    assert (seen.joined, seen.why) == (("box2",), "box2 joined with cpu")


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        ({"version": "9.9"}, None, f"it has hostler 9.9, we have {hostler.__version__}"),
        ({}, RuntimeError("ModuleNotFoundError: No module named 'orchestrator'"), "is not installed"),
        ({}, RuntimeError("cannot"), "could not be started there (RuntimeError): cannot"),
    ],
)
async def test_a_machine_that_is_not_fit_is_left_out_and_the_log_says_why_once(
    ray: FakeRay,
    watch: Callable[[], Watched],
    caplog: pytest.LogCaptureFixture,
    answer: dict[str, Any],
    error: Exception | None,
    why: str,
) -> None:
    ray.add("box2")
    ray.add("box3")
    ray.answers["id-box2"] = answer
    if error is not None:
        ray.errors["id-box2"] = error
    with caplog.at_level(logging.ERROR):
        watched = watch()
        assert (await watched.next()).joined == ("box3",)
        ray.add("box4")  # It takes some more polls, in which box2 is asked again.
        assert (await watched.next()).joined == ("box4",)
    (told,) = [record for record in caplog.records if record.message == "a node is left out"]
    assert (told.__dict__["node"], why in told.__dict__["why"]) == ("box2", True)
    ray.answers, ray.errors = {}, {}
    assert (await watched.next()).joined == ("box2",)


async def test_a_machine_whose_raylet_refuses_is_gone_before_ray_says_so(
    ray: FakeRay, watch: Callable[[], Watched]
) -> None:
    ray.add("box2")
    ray.add("box3")
    watched = watch()
    await watched.next()
    ray.sockets["box2"].close()
    seen = await watched.next()
    assert (seen.left, [d.id for d in seen.devices]) == (("box2",), ["box3/cpu"])
    assert "refuses" in seen.why
    with pytest.raises(WorkerLost):
        watched.nodes.options("box2")


async def test_a_machine_that_comes_back_under_another_id_has_its_name_again(
    ray: FakeRay, watch: Callable[[], Watched]
) -> None:
    ray.add("box2")
    watched = watch()
    await watched.next()
    ray.sockets["box2"].close()
    await watched.next()
    ray.add("box2", ray_id="another")  # Ray still lists the dead one.
    seen = await watched.next()
    assert (seen.joined, [d.id for d in seen.devices]) == (("box2",), ["box2/cpu"])
    assert watched.nodes.options("box2") == {"scheduling_strategy": ("another", False)}


async def test_a_call_that_hangs_ends_with_its_machine(ray: FakeRay, watch: Callable[[], Watched]) -> None:
    ray.add("box2")
    watched = watch()
    await watched.next()
    ray.hanging.add("locate")
    asking = asyncio.create_task(Elsewhere(watched.nodes).locate(ModelSpec("m", "m"), "box2"))
    await asyncio.sleep(0)
    ray.sockets["box2"].close()
    async with asyncio.timeout(5):
        with pytest.raises(WorkerLost):
            await asking


@contextlib.contextmanager
def idle_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stays until it is killed."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_worker_that_was_cut_off_is_ended_before_its_machine_is_used_again(
    ray: FakeRay, watch: Callable[[], Watched]
) -> None:
    ray.add("box2")
    watched = watch()
    await watched.next()
    with idle_process() as process:
        identity = ProcessId.of(process.pid)
        assert identity is not None
        worker = RemoteWorker("box2", "127.0.0.1:1", identity.pid, identity.start_ticks)
        ray.sockets["box2"].close()
        await watched.next()
        async with asyncio.timeout(1):  # Nothing to wait for: the machine is away.
            assert await Elsewhere(watched.nodes).end(worker)
        assert identity.is_alive
        ray.reopen("box2")
        assert (await watched.next()).joined == ("box2",)
        assert not identity.is_alive


async def test_a_worker_elsewhere_is_ended_by_its_pid_and_start_time(
    ray: FakeRay, watch: Callable[[], Watched]
) -> None:
    ray.add("box2")
    watched = watch()
    await watched.next()
    elsewhere = Elsewhere(watched.nodes)
    with idle_process() as process:
        worker = RemoteWorker("box2", "", process.pid)
        assert not await elsewhere.end(worker)  # Which process that is, is not known: Ray must end it.
        ticks = await elsewhere.start_ticks(worker)
        another = RemoteWorker("box2", "", process.pid, ticks - 1)
        assert await elsewhere.end(another)
        assert process.poll() is None
        assert await elsewhere.end(RemoteWorker("box2", "", process.pid, ticks))
        assert process.wait(5) == -9


# ------------------------------------------------------------ what the scheduler makes of it

"""The real effects: Ray for processes, gRPC for workers, the store for files.

Above it: the scheduler's parts, through the `Effects` protocol. Below it: Ray (blocking calls, kept in threads),
`ray_nodes.py` for other machines, `worker_client.py`, `store_client.py`, `remembering.py`, the run directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from hostler.channel import worker_key
from hostler.config import HostlerConfig
from hostler.errors import HostlerError, Unavailable, WorkerLost
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.rundir import RunDir

from orchestrator import devices, ray_session
from orchestrator.devices import Device
from orchestrator.effects import FoundWorker, Memory, Placement, Report
from orchestrator.elsewhere import Elsewhere
from orchestrator.experience import Experience
from orchestrator.models import Located, ModelSpec
from orchestrator.nodes import NodesSeen, RemoteWorker
from orchestrator.process_id import ProcessId
from orchestrator.ray_nodes import RayNodes
from orchestrator.remembering import ExperienceFile, PlacementsFile
from orchestrator.store_client import StoreClient
from orchestrator.stores import Stores
from orchestrator.worker_client import WorkerClient

log = logging.getLogger(__name__)

ACTOR_CLASS = "workers.actor:WorkerActor"
"""Entry point of the worker shell: rooms do not import each other, so it is named, not imported."""

ACTOR_PREFIX = "hostler-"
SPAWN_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 20.0
ADOPT_TIMEOUT_S = 2.0
RAY_CALL_TIMEOUT_S = 10.0
EXIT_TIMEOUT_S = 5.0


class RayEffects:
    """Effects in the world. Everything runs in the orchestrator's loop; Ray's blocking calls run in threads."""

    def __init__(self, config: HostlerConfig, run_dir: RunDir, actor_class: str = ACTOR_CLASS) -> None:
        self._run_dir = run_dir
        self._placements_file = PlacementsFile(run_dir.path)
        self._experience_file = ExperienceFile(config.models_dir)
        self._devices: Sequence[Device] = ()
        self._actor_class = actor_class
        self._connected: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._clients: dict[str, WorkerClient] = {}
        self._processes: dict[str, ProcessId] = {}
        self._remote: dict[str, RemoteWorker] = {}
        self._ray_environment = ray_session.environment(in_cluster=config.ray_address is not None)
        self._nodes = RayNodes(config, self._ray)
        self._elsewhere = Elsewhere(self._nodes)
        self._stores = Stores(StoreClient(config.models_dir), self._elsewhere)
        self._creating: dict[str, asyncio.Future[Any]] = {}
        self._owns_ray = True

    def use_devices(self, found: Sequence[Device]) -> None:
        """Say which devices to measure."""
        self._devices = found

    async def watch_nodes(self) -> AsyncIterator[NodesSeen]:
        """Yield what other machines offer, then the same after every change. A Ray of our own has none."""
        await self._ray()
        if self._owns_ray:
            yield NodesSeen()
            return
        async for seen in self._nodes.watch():
            yield seen

    def on_connected(self, callback: Callable[[], None]) -> None:
        """Call back in the loop once Ray is connected."""
        self._connected.add_done_callback(lambda _: callback())

    # ------------------------------------------------------------ Ray

    async def connect(self) -> ray_session.RaySession:
        """Wait for Ray and become its driver; whoever waits for Ray goes on."""
        os.environ.update(self._ray_environment)
        importing = asyncio.create_task(asyncio.to_thread(importlib.import_module, "ray"))
        while (session := ray_session.read(self._run_dir.path)) is None:  # noqa: ASYNC110  (a file, not an event)
            await asyncio.sleep(0.02)
        if session.token:
            os.environ[ray_session.TOKEN_VARIABLE] = session.token
        else:
            os.environ["RAY_AUTH_MODE"] = "disabled"
        ray = await importing
        # In a thread Ray cannot install its own SIGTERM handler over ours.
        await asyncio.to_thread(
            ray.init,
            address=session.address,
            namespace=ray_session.NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
            **({"_node_ip_address": "127.0.0.1"} if session.pid else {}),
        )
        self._owns_ray = bool(session.pid)
        self._connected.set_result(ray)
        return session

    async def _ray(self) -> Any:
        return await asyncio.shield(self._connected)

    async def find_workers(self) -> tuple[FoundWorker, ...]:
        """Return the living workers of an earlier orchestrator; remove sockets that nobody serves."""
        placements = {p.worker_id: p for p in self.recall().placements}
        names = await self._named_actors()
        if not self._owns_ray:
            await self._nodes.looked()
        if names is None:  # Those that we remember are asked all the same: to load a model twice would be worse.
            ids = [i for i in placements if i in self._remote or self._run_dir.worker_socket(i).exists()]
            return tuple(await asyncio.gather(*(self._find(i, placements[i]) for i in ids)))
        ids = [name.removeprefix(ACTOR_PREFIX) for name in names if name.startswith(ACTOR_PREFIX)]
        if not self._owns_ray:  # On a shared cluster others' workers have the same prefix.
            ours = {*placements, *self._remote}
            ids = [i for i in ids if i in ours or self._run_dir.worker_socket(i).exists()]
        # Workers that are being created serve their socket before Ray lists their name.
        living = {self._run_dir.worker_socket(i) for i in (*ids, *self._clients, *self._creating)}
        for path in self._run_dir.path.glob("w-*.sock"):
            if path not in living:
                path.unlink(missing_ok=True)
        return tuple(await asyncio.gather(*(self._find(i, placements.get(i)) for i in ids)))

    async def _named_actors(self) -> list[str] | None:
        """Return the names of all living actors; None when Ray is up but does not say."""
        ray = await self._ray()
        try:
            async with asyncio.timeout(RAY_CALL_TIMEOUT_S):
                names: list[str] = await asyncio.to_thread(ray.util.list_named_actors)
        except Exception:
            log.exception("Ray could not list its actors")
            return None
        return names

    async def _find(self, worker_id: str, placement: Placement | None) -> FoundWorker:
        client = WorkerClient(self.address(worker_id), None, self._key(worker_id))
        report = None
        heartbeats = client.watch()
        try:
            async with asyncio.timeout(ADOPT_TIMEOUT_S):
                report = await anext(heartbeats)
        except (TimeoutError, StopAsyncIteration, HostlerError):
            log.warning("a worker does not answer", extra={"worker": worker_id})
        finally:
            await heartbeats.aclose()  # type: ignore[attr-defined]
            await client.close()
        if report is not None and worker_id not in self._remote:
            self._remember_pid(worker_id, report.pid)
        remote = self._remote.get(worker_id)
        started = worker_id in self._processes or (remote is not None and remote.pid > 0)
        return FoundWorker(worker_id, report, placement, remote.node if remote else "", started)

    async def spawn(self, worker_id: str, node: str) -> int:
        """Start a blank worker on a machine (empty: this one); return its pid once it serves.

        Raises:
            HostlerError: Ray could not start it, its machine is gone, or it does not answer.
        """
        ray = await self._ray()
        options = {"name": ACTOR_PREFIX + worker_id, "lifetime": "detached", "num_cpus": 0, "max_restarts": 0}
        options |= self._nodes.options(node)
        if node:
            self._remote[worker_id] = RemoteWorker(node)
            listen, key = self._nodes.listen_address(node), self._key(worker_id)
        else:
            listen, key = str(self._run_dir.worker_socket(worker_id)), ""

        def create() -> Any:
            module, _, name = self._actor_class.partition(":")
            actor_class = ray.remote(getattr(importlib.import_module(module), name))
            return actor_class.options(**options).remote(worker_id, listen, key)

        # Kept until the worker is killed: a spawn may be given up while the thread still registers the actor.
        creating = self._creating[worker_id] = asyncio.ensure_future(asyncio.to_thread(create))
        try:
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                actor = await asyncio.shield(creating)
                if node:
                    pid = await self._nodes.unless_lost(node, self._started_elsewhere(worker_id, node, actor))
                else:
                    pid = int(await asyncio.wrap_future(actor.ping.remote().future()))
                    self._remember_pid(worker_id, pid)
        except TimeoutError:
            raise Unavailable(f"a worker process did not start within {SPAWN_TIMEOUT_S:g} s") from None
        except ray.exceptions.RayError as error:
            log.error("Ray could not start a worker", extra={"worker": worker_id, "error": str(error)[:2000]})
            raise WorkerLost("a worker process could not be started") from None
        await self._client(worker_id).connect(CONNECT_TIMEOUT_S)
        return pid

    async def _started_elsewhere(self, worker_id: str, node: str, actor: Any) -> int:
        """Wait until a worker on another machine listens; remember where, and which process it is."""
        pid = int(await asyncio.wrap_future(actor.ping.remote().future()))
        address = str(await asyncio.wrap_future(actor.target.remote().future()))
        started = RemoteWorker(node, address, pid)
        self._remote[worker_id] = replace(started, start_ticks=await self._elsewhere.start_ticks(started))
        return pid

    def _key(self, worker_id: str) -> str:
        """Return what opens a worker on another machine."""
        return worker_key(self._run_dir.token(), worker_id) if worker_id in self._remote else ""

    def _remember_pid(self, worker_id: str, pid: int) -> None:
        if pid and (process := ProcessId.of(pid)) is not None:
            self._processes[worker_id] = process

    async def kill(self, worker_id: str) -> None:
        """End a worker process for certain, and forget its actor and its socket."""
        known, creating = self._processes.get(worker_id), self._creating.pop(worker_id, None)
        remote = self._remote.get(worker_id)
        if remote is not None:
            if not await self._elsewhere.end(remote):
                await self._end_actor(worker_id, creating)
        # First and without Ray: a fenced worker must stop at once, and a frozen one obeys nothing else. Ray sees the
        # end of a process by itself; it is asked only to end one that we do not know or cannot end.
        elif known is None or not await asyncio.to_thread(known.end, EXIT_TIMEOUT_S):
            await self._end_actor(worker_id, creating)
        self._processes.pop(worker_id, None)
        self._remote.pop(worker_id, None)
        if (client := self._clients.pop(worker_id, None)) is not None:
            await client.close()
        self._run_dir.worker_socket(worker_id).unlink(missing_ok=True)

    async def _end_actor(self, worker_id: str, creating: asyncio.Future[Any] | None) -> None:
        def end(ray: Any, actor: Any) -> None:
            with contextlib.suppress(ValueError):  # No such actor: already gone.
                ray.kill(actor or ray.get_actor(ACTOR_PREFIX + worker_id), no_restart=True)

        try:
            async with asyncio.timeout(RAY_CALL_TIMEOUT_S):
                ray = await self._ray()
                actor = await creating if creating is not None else None
                await asyncio.to_thread(end, ray, actor)
        except Exception as error:
            # Not only Ray's own errors: get_actor fails an assertion when the actor dies under it and its creator, an
            # orchestrator that was killed, had no other. The room of a worker must never stay taken for such a reason.
            log.error(
                "Ray could not end an actor",
                extra={"worker": worker_id, "error": f"{type(error).__name__}: {error}"[:500]},
            )

    # ------------------------------------------------------------ workers

    def address(self, worker_id: str) -> str:
        """Return the worker's gRPC target; one on another machine has it once it was spawned."""
        remote = self._remote.get(worker_id)
        return remote.address if remote else f"unix:{self._run_dir.worker_socket(worker_id)}"

    def new_worker_id(self) -> str:
        """Return a random id."""
        return secrets.token_hex(8)

    def _client(self, worker_id: str, generation: int = 0) -> WorkerClient:
        """Return the client of a worker, speaking under its generation; 0 for a blank one."""
        if worker_id not in self._clients:
            self._clients[worker_id] = WorkerClient(self.address(worker_id), generation or None, self._key(worker_id))
        elif generation:
            self._clients[worker_id].claim(generation)
        return self._clients[worker_id]

    async def load(
        self, worker_id: str, generation: int, request: lifecycle_pb2.LoadRequest, report: Report
    ) -> lifecycle_pb2.ModelInfo:
        """Have a blank worker load its model."""
        return await self._client(worker_id, generation).load(request, report)

    async def sleep(self, worker_id: str, generation: int, deadline_s: float) -> lifecycle_pb2.SleepResponse:
        """Have the worker free its devices once its requests have ended."""
        return await self._client(worker_id, generation).sleep(deadline_s)

    async def wake(self, worker_id: str, generation: int, devices: Sequence[str], kv_cache_bytes: int) -> None:
        """Have a sleeping worker serve again."""
        await self._client(worker_id, generation).wake(devices, kv_cache_bytes)

    async def resize(self, worker_id: str, generation: int, kv_cache_bytes: int) -> int:
        """Change what the worker's KV cache may grow to."""
        return await self._client(worker_id, generation).resize(kv_cache_bytes)

    def watch(self, worker_id: str, generation: int) -> AsyncIterator[lifecycle_pb2.WatchResponse]:
        """Yield the worker's heartbeats until its stream ends."""
        return self._client(worker_id, generation).watch()

    async def drain(self, worker_id: str, generation: int, deadline_s: float) -> int:
        """Have the worker refuse new requests and finish the running ones."""
        return await self._client(worker_id, generation).drain(deadline_s)

    async def unload(self, worker_id: str, generation: int) -> None:
        """Ask the worker to end itself, and give it a moment to do so."""
        await self._client(worker_id, generation).unload()
        if (remote := self._remote.get(worker_id)) is not None:
            await self._elsewhere.wait_for_end(remote, EXIT_TIMEOUT_S)
        elif (known := self._processes.get(worker_id)) is not None:
            await asyncio.to_thread(known.wait, EXIT_TIMEOUT_S)

    # ------------------------------------------------------------ store, devices, memory, clock

    async def list_stored(self) -> tuple[ModelSpec, ...]:
        """Return every model in the store."""
        return await self._stores.list_stored()

    async def locate(self, spec: ModelSpec) -> Located | None:
        """Return the model's files and footprint if they are here, else if they are on another machine."""
        return await self._stores.locate(spec)

    async def fetch(self, spec: ModelSpec, report: Report) -> None:
        """Pull the model to this machine."""
        await self._stores.fetch(spec, report)

    async def bring(self, spec: ModelSpec, node: str, report: Report) -> Located:
        """Return the model's files on one machine, fetching them there if need be."""
        return await self._stores.bring(spec, node, report)

    async def measure_foreign(self, pids: Collection[int], reserved: dict[str, int]) -> dict[str, int]:
        """Return what other programs hold, by device. A machine that does not answer is left out."""
        there = [(w.node, w.pid) for w in self._remote.values()]
        asked = [
            self._elsewhere.foreign_bytes(member, [pid for node, pid in there if node == member.name], reserved)
            for member in self._elsewhere.members
        ]
        here = asyncio.to_thread(devices.foreign_bytes, self._devices, pids, reserved)
        found: dict[str, int] = {}
        for held in await asyncio.gather(here, *asked):
            found |= held
        return found

    async def measure_hosts(self) -> dict[str, int]:
        """Return what sleepers may still take of each GPU machine's memory. One that does not answer is left out."""
        found: dict[str, int] = {}
        if any(device.kind == "cuda" for device in self._devices):
            found[""] = await asyncio.to_thread(devices.host_spare_bytes)
        with_gpus = [m for m in self._elsewhere.members if any(device.kind == "cuda" for device in m.devices)]
        answers = await asyncio.gather(*map(self._elsewhere.host_spare_bytes, with_gpus))
        return found | {m.name: spare for m, spare in zip(with_gpus, answers, strict=True) if spare is not None}

    def recall_experience(self) -> Experience:
        """Return what earlier loads have taught."""
        return self._experience_file.read()

    def remember_experience(self, experience: Experience) -> None:
        """Store what loads have taught."""
        self._experience_file.write(experience)

    def recall(self) -> Memory:
        """Return what was remembered last, and know those processes again."""
        recalled = self._placements_file.read()
        self._processes = recalled.processes | self._processes
        self._remote |= recalled.remote
        return recalled.memory

    def remember(self, memory: Memory) -> None:
        """Store what must survive this process."""
        self._placements_file.write(memory, self._processes, self._remote)

    def now_s(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def unix_ms(self) -> int:
        """Return wall-clock milliseconds."""
        return int(time.time() * 1000)

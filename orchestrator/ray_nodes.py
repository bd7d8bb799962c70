"""The other machines of a Ray cluster: who is there, what they offer, and our agent on each.

Above it: `effects_ray.py` and `elsewhere.py`. Below it: Ray, `node_agent.py` (which runs there), `nodes.py` (data).

Ray itself takes 15 s to notice that a machine is gone. So each machine's raylet is also asked for a connection twice a
second: one that refuses is dead, and its workers with it; one that does not answer in time, twice in a row, is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import hostler
from hostler.config import HostlerConfig
from hostler.errors import Unavailable, WorkerLost

from orchestrator import nodes
from orchestrator.devices import Device, configured_on, seen_from_elsewhere
from orchestrator.node_agent import NodeAgent
from orchestrator.nodes import Machine, Member, NodesSeen, RemoteWorker

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.5
LIST_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 0.75
MAX_UNANSWERED = 2
JOIN_TIMEOUT_S = 30.0
REJOIN_AFTER_S = 15.0
"""A machine that could not join is asked again after this long: somebody may have installed what was missing."""
FIRST_LOOK_S = 20.0
"""So long a start waits for the machines that are there already."""
END_TIMEOUT_S = 5.0
ANSWER_SLACK_S = 3.0

_NO_ANSWER = "its raylet does not answer"


class _Node:
    """A member and how we reach it. `lost` is set once and for all when it is gone."""

    def __init__(self, member: Member, agent: Any) -> None:
        self.member = member
        self.agent = agent
        self.lost = asyncio.Event()
        self.num_unanswered = 0


class RayNodes:
    """Everything runs in the orchestrator's loop; Ray's blocking calls run in threads.

    Args:
        config: devices of all machines, where models are kept.
        connected: waits for Ray and returns its module.
    """

    def __init__(self, config: HostlerConfig, connected: Callable[[], Awaitable[Any]]) -> None:
        self._config = config
        self._connected = connected
        self._nodes: dict[str, _Node] = {}
        self._names: dict[str, str] = {}
        self._joining: dict[str, asyncio.Task[_Node]] = {}
        self._refused: dict[str, tuple[str, float]] = {}
        self._to_end: dict[str, list[RemoteWorker]] = {}
        self._looked = asyncio.Event()
        self._listing: asyncio.Future[Any] | None = None
        self._ray: Any = None
        self._here = ""

    # ------------------------------------------------------------ who is there

    async def watch(self) -> AsyncIterator[NodesSeen]:
        """Yield what the machines that are there now offer, then the same after every change. Never ends."""
        self._ray = await self._connected()
        self._here = self._ray.get_runtime_context().get_node_id()
        began_s = time.monotonic()
        machines: dict[str, Machine] = {}
        try:
            while True:
                machines = await self._list(machines)
                left = await self._judge(machines)
                joined = self._collect(machines)
                self._invite(machines)
                if not self._looked.is_set():
                    if self._joining and time.monotonic() - began_s < FIRST_LOOK_S:
                        await asyncio.wait(self._joining.values(), timeout=POLL_S)
                        continue
                    self._looked.set()
                    yield self._seen([node.member for node in self._nodes.values()], left)
                elif joined or left:
                    yield self._seen(joined, left)
                await asyncio.sleep(POLL_S)
        finally:
            self._looked.set()
            for task in self._joining.values():
                task.cancel()

    async def looked(self) -> None:
        """Wait until the machines that are there already have been found. Whoever calls `watch` sees to it."""
        await self._looked.wait()

    def _seen(self, joined: Sequence[Member], left: Mapping[str, str]) -> NodesSeen:
        return nodes.seen([node.member for node in self._nodes.values()], joined, left)

    async def _list(self, before: dict[str, Machine]) -> dict[str, Machine]:
        """Return the living machines but ours by Ray's id; the same as before when Ray does not say."""
        if self._listing is None:  # Else the last call still hangs; a second one would take another thread.
            self._listing = asyncio.ensure_future(asyncio.to_thread(self._ray.nodes))
        await asyncio.wait({self._listing}, timeout=LIST_TIMEOUT_S)
        if not self._listing.done():
            return before
        listing, self._listing = self._listing, None
        if (error := listing.exception()) is not None:
            log.warning("Ray does not list its nodes", extra={"error": f"{type(error).__name__}: {error}"[:300]})
            return before
        living = [nodes.machine_of(row) for row in listing.result() if row["Alive"] and row["NodeID"] != self._here]
        return {machine.ray_id: machine for machine in sorted(living, key=lambda m: (m.address, m.port))}

    async def _judge(self, machines: Mapping[str, Machine]) -> dict[str, str]:
        """Drop the members that are gone; return why, by name."""
        ended = [name for name, node in self._nodes.items() if node.member.machine.ray_id not in machines]
        left = dict.fromkeys(ended, "Ray says that it ended")
        asked = [node for name, node in self._nodes.items() if name not in left]
        for node, answer in zip(asked, await asyncio.gather(*(_answers(n.member.machine) for n in asked)), strict=True):
            node.num_unanswered = 0 if answer else node.num_unanswered + 1
            if answer is False:
                left[node.member.name] = "its raylet refuses connections"
            elif node.num_unanswered >= MAX_UNANSWERED:
                left[node.member.name] = "it does not answer"
        for name, why in left.items():
            log.error("a node is gone", extra={"node": name, "why": why})
            node = self._nodes.pop(name)
            node.lost.set()
            self._refused[node.member.machine.ray_id] = _NO_ANSWER, time.monotonic() + REJOIN_AFTER_S
        return left

    def _collect(self, machines: Mapping[str, Machine]) -> list[Member]:
        """Take in whoever has joined meanwhile, and remember who could not."""
        joined = []
        for ray_id, task in list(self._joining.items()):
            if not task.done():
                continue
            del self._joining[ray_id]
            error = task.exception()
            if error is None:
                self._refused.pop(ray_id, None)
                node = task.result()
                self._nodes[node.member.name] = node
                joined.append(node.member)
                found = [device.id for device in node.member.devices]
                log.info("a node joined", extra={"node": node.member.name, "devices": found})
            elif ray_id in machines:
                self._refuse(machines[ray_id], error)
        return joined

    def _refuse(self, machine: Machine, error: BaseException) -> None:
        why = str(error) if isinstance(error, Unavailable) else _in_words(error)
        before = self._refused.get(machine.ray_id)
        self._refused[machine.ray_id] = why, time.monotonic() + REJOIN_AFTER_S
        if before is None or before[0] != why:
            name = self._names[machine.ray_id]
            log.error("a node is left out", extra={"node": name, "address": machine.address, "why": why})

    def _invite(self, machines: Mapping[str, Machine]) -> None:
        members = {node.member.machine.ray_id for node in self._nodes.values()}
        self._names = {ray_id: name for ray_id, name in self._names.items() if ray_id in machines}
        self._refused = {ray_id: why for ray_id, why in self._refused.items() if ray_id in machines}
        for ray_id, machine in machines.items():
            _, again_at_s = self._refused.get(ray_id, ("", 0.0))
            if ray_id in members or ray_id in self._joining or time.monotonic() < again_at_s:
                continue
            taken = {*self._nodes, *(self._names[other] for other in self._joining)}
            if (name := self._names.get(ray_id)) is None or name in taken:
                name = self._names[ray_id] = nodes.name_for(machine, taken)
            self._joining[ray_id] = asyncio.create_task(self._join(machine, name))

    async def _join(self, machine: Machine, name: str) -> _Node:
        """Start our agent on a machine and ask what is there.

        Raises:
            Unavailable: it is not fit to be a member; says why.
        """
        if not await _answers(machine):
            raise Unavailable(_NO_ANSWER)
        agent_class = self._ray.remote(NodeAgent)
        models_dir = str(self._config.models_dir) if self._config.models_dir else None
        options = {"num_cpus": 0, "max_restarts": 0, **self._pinned(machine.ray_id)}
        agent = await asyncio.to_thread(lambda: agent_class.options(**options).remote(models_dir))
        configured = [device.model_dump() for device in configured_on(name, self._config.devices)]
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            found = await _result(agent.describe.remote(configured, self._config.sleep_memory))
        if found["version"] != hostler.__version__:
            raise Unavailable(f"it has hostler {found['version']}, we have {hostler.__version__}")
        for worker in self._to_end.pop(name, []):  # Of an earlier time, when it could not be reached.
            async with asyncio.timeout(END_TIMEOUT_S + ANSWER_SLACK_S):
                await _result(agent.end.remote(worker.pid, worker.start_ticks, END_TIMEOUT_S))
        here = [Device(**values) for values in found["devices"]]
        devices = tuple(seen_from_elsewhere(device, name, int(found["num_cores"])) for device in here)
        return _Node(Member(name, machine, devices, int(found["sleep_budget_bytes"])), agent)

    # ------------------------------------------------------------ what can be done there

    @property
    def members(self) -> tuple[Member, ...]:
        """The machines that are there now."""
        return tuple(node.member for node in self._nodes.values())

    def is_member(self, name: str) -> bool:
        """Tell whether a machine is there now."""
        return name in self._nodes

    def _node(self, name: str) -> _Node:
        if (node := self._nodes.get(name)) is None:
            raise WorkerLost(f"The machine {name} is not there.")
        return node

    def options(self, name: str) -> dict[str, Any]:
        """Return the actor options that pin a worker to a machine (empty: this one).

        Raises:
            WorkerLost: it is not there.
        """
        return self._pinned(self._node(name).member.machine.ray_id if name else self._here)

    def _pinned(self, ray_id: str) -> dict[str, Any]:
        if not ray_id:  # Nobody watches the cluster: this machine is all of it.
            return {}
        strategies = self._ray.util.scheduling_strategies
        return {"scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(ray_id, soft=False)}

    def listen_address(self, name: str) -> str:
        """Return where a worker on that machine listens: its own address within the cluster, any free port."""
        return nodes.host_port(self._node(name).member.machine.address, 0)

    def end_on_return(self, worker: RemoteWorker) -> None:
        """Have a worker's process ended before its machine, which is away, becomes a member again."""
        self._to_end.setdefault(worker.node, []).append(worker)

    async def unless_lost(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """Return the outcome of `work`, which needs a machine.

        Raises:
            WorkerLost: the machine is gone, or goes meanwhile.
        """
        try:
            node = self._node(name)
        except WorkerLost:
            work.close()
            raise
        doing, losing = asyncio.create_task(work), asyncio.create_task(node.lost.wait())
        try:
            await asyncio.wait({doing, losing}, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise WorkerLost(f"The machine {name} was lost.")
        finally:
            for task in (doing, losing):
                task.cancel()

    async def ask(self, name: str, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Return the answer of a machine's agent.

        Raises:
            WorkerLost: the machine is gone, or its agent does not answer in time.
        """

        async def call() -> Any:
            async with asyncio.timeout(timeout_s + ANSWER_SLACK_S):
                return await _result(getattr(self._node(name).agent, method).remote(*arguments))

        try:
            return await self.unless_lost(name, call())
        except TimeoutError:
            raise WorkerLost(f"The machine {name} did not answer within {timeout_s:g} s.") from None

    async def stream(self, name: str, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Yield what a machine's agent yields, as it comes.

        Raises:
            WorkerLost: the machine is gone, or goes meanwhile.
        """
        generator = getattr(self._node(name).agent, method).options(num_returns="streaming").remote(*arguments)

        async def step() -> tuple[bool, Any]:
            try:
                return True, await _result(await anext(generator))
            except StopAsyncIteration:
                return False, None

        try:
            while (item := await self.unless_lost(name, step()))[0]:
                yield item[1]
        finally:
            with contextlib.suppress(Exception):  # It has ended, or its machine has.
                self._ray.cancel(generator)


async def _result(reference: Any) -> Any:
    """Wait for a call's answer. Not `await reference`, which would tie it to the thread that made Ray's connection."""
    answer = asyncio.wrap_future(reference.future())
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(answer)  # Ray fills the future in however late; it must not find it cancelled.


async def _answers(machine: Machine) -> bool | None:
    """Return whether the machine's raylet accepts a connection; None when nothing at all comes back in time."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(machine.address, machine.port)
    except ConnectionRefusedError:
        return False
    except (OSError, TimeoutError):
        return None
    writer.transport.abort()
    return True


def _in_words(error: BaseException) -> str:
    """Return why a machine could not join."""
    text = str(error)
    if "ModuleNotFoundError" in text or "No module named" in text:
        return f"hostler {hostler.__version__} is not installed in the environment that its Ray was started in"
    if isinstance(error, TimeoutError):
        return f"it did not start our agent within {JOIN_TIMEOUT_S:g} s"
    return f"our agent could not be started there ({type(error).__name__}): {text.strip().splitlines()[-1][:300]}"

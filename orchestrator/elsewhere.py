"""What is done on other machines through our agents there: ask their stores, measure, end workers.

Above it: `effects_ray.py`, `stores.py`. Below it: `ray_nodes.py`, which carries the calls; `node_agent.py` answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hostler.errors import BY_REASON, Internal, WorkerLost

from orchestrator.effects import Report
from orchestrator.models import Located, ModelSpec
from orchestrator.node_agent import Failure
from orchestrator.nodes import Member, RemoteWorker
from orchestrator.ray_nodes import RayNodes

END_TIMEOUT_S = 5.0
LOCATE_TIMEOUT_S = 60.0
"""A store may be on a slow disk, and its first look-up imports."""


class Elsewhere:
    """Calls to the agents of the cluster's other machines."""

    def __init__(self, nodes: RayNodes) -> None:
        self._nodes = nodes

    @property
    def members(self) -> tuple[Member, ...]:
        """The machines that are there now."""
        return self._nodes.members

    async def locate(self, spec: ModelSpec, name: str) -> Located | None:
        """Return a model's files on one machine, if they are there.

        Raises:
            HostlerError: as the store there said, or `WorkerLost`.
        """
        failure, found = await self._nodes.ask(name, "locate", spec, timeout_s=LOCATE_TIMEOUT_S)
        _raise(failure)
        return replace(found, node=name) if found else None

    async def fetch(self, spec: ModelSpec, name: str, report: Report) -> None:
        """Pull a model to one machine; cancelling ends the download there.

        Raises:
            HostlerError: as the store there said, or `WorkerLost`.
        """
        async with contextlib.aclosing(self._nodes.stream(name, "fetch", spec)) as steps:
            async for failure, progress in steps:
                _raise(failure)
                report(progress)

    async def foreign_bytes(self, member: Member, pids: Sequence[int], reserved: Mapping[str, int]) -> dict[str, int]:
        """Return what other programs hold on one machine's devices; nothing when it does not answer."""
        local = [replace(device, id=device.local_id) for device in member.devices if device.total_bytes]
        if not local:
            return {}
        names = {device.local_id: device.id for device in member.devices}
        held = {local_id: reserved.get(name, 0) for local_id, name in names.items()}
        try:
            found = await self._nodes.ask(member.name, "foreign_bytes", local, pids, held, timeout_s=END_TIMEOUT_S)
        except WorkerLost:
            return {}
        return {names[local_id]: num_bytes for local_id, num_bytes in found.items()}

    async def host_spare_bytes(self, member: Member) -> int | None:
        """Return what sleepers may still take of one machine's memory; None when it does not answer."""
        try:
            return int(await self._nodes.ask(member.name, "host_spare_bytes", timeout_s=END_TIMEOUT_S))
        except WorkerLost:
            return None

    async def start_ticks(self, worker: RemoteWorker) -> int:
        """Return what tells a worker's process from a later one of the same number."""
        return int(await self._nodes.ask(worker.node, "start_ticks", worker.pid, timeout_s=END_TIMEOUT_S))

    async def wait_for_end(self, worker: RemoteWorker, timeout_s: float) -> None:
        """Give a worker's process a moment to end by itself."""
        with contextlib.suppress(WorkerLost):
            await self._nodes.ask(worker.node, "wait", worker.pid, worker.start_ticks, timeout_s, timeout_s=timeout_s)

    async def end(self, worker: RemoteWorker) -> bool:
        """Kill a worker's process on its machine; return whether no more can be done about it.

        One whose machine is away dies with it; should the machine come back with the process alive, that is ended
        before anything new is placed there.
        """
        if worker.pid and worker.start_ticks:
            process = (worker.pid, worker.start_ticks, END_TIMEOUT_S)
            try:
                return bool(await self._nodes.ask(worker.node, "end", *process, timeout_s=END_TIMEOUT_S))
            except WorkerLost:
                pass
        if self._nodes.is_member(worker.node):
            return False
        self._nodes.end_on_return(worker)
        return True


def _raise(failure: Failure | None) -> None:
    """Raise what an agent's answer says went wrong."""
    if failure is not None:
        reason, message = failure
        raise BY_REASON.get(reason, Internal)(message)

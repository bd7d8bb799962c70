"""What runs on each other machine of the cluster: finds its devices, asks its model store, ends its workers.

Above it: `ray_nodes.py`, which has Ray start one as an actor on every node; this file does not know Ray. Below it:
`devices.py`, `store_client.py`, `process_id.py`, as on the first machine. The room's requests never pass through it.

Answers that may be read by another version are plain values. A failure is part of the answer, as (reason, message):
an exception would arrive wrapped, with a stack.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hostler
from hostler.config import DeviceConfig
from hostler.errors import HostlerError

from orchestrator import devices
from orchestrator.devices import Device
from orchestrator.models import Located, ModelSpec
from orchestrator.process_id import ProcessId
from orchestrator.state import Progress
from orchestrator.store_client import StoreClient

MODELS_DIR_VARIABLE = "HOSTLER_MODELS_DIR"

Failure = tuple[str, str]
"""Reason and message of a `HostlerError`."""


class NodeAgent:
    """One machine's hands. Every method runs in the actor's event loop.

    Args:
        models_dir: where the first machine keeps its models; this one's own setting of $HOSTLER_MODELS_DIR comes first.
    """

    def __init__(self, models_dir: str | None) -> None:
        chosen = os.environ.get(MODELS_DIR_VARIABLE) or models_dir
        self._store = StoreClient(Path(chosen) if chosen else None)

    async def describe(self, configured: list[dict[str, Any]], sleep_memory: int | None) -> dict[str, Any]:
        """Return this machine's version, devices, cores and host memory for sleeping models.

        Args:
            configured: its devices as configured; none: as discovered.
            sleep_memory: as configured; None: chosen from what is free.
        """
        configs = tuple(DeviceConfig.model_validate(values) for values in configured)
        found = await asyncio.to_thread(devices.discover, configs)
        return {
            "version": hostler.__version__,
            "devices": [asdict(device) for device in found],
            "num_cores": devices.num_physical_cores(),
            "sleep_budget_bytes": devices.sleep_budget_bytes(sleep_memory, found),
        }

    async def foreign_bytes(
        self, found: list[Device], pids: Collection[int], reserved: dict[str, int]
    ) -> dict[str, int]:
        """Return what programs other than our workers hold, by device as this machine names it."""
        return await asyncio.to_thread(devices.foreign_bytes, found, pids, reserved)

    async def host_spare_bytes(self) -> int:
        """Return what sleepers may still take of this machine's memory, as `devices.host_spare_bytes`."""
        return await asyncio.to_thread(devices.host_spare_bytes)

    async def locate(self, spec: ModelSpec) -> tuple[Failure | None, Located | None]:
        """Return the model's files and footprint if they are on this machine."""
        try:
            return None, await self._store.locate(spec)
        except HostlerError as error:
            return (error.reason, error.message), None

    async def fetch(self, spec: ModelSpec) -> AsyncIterator[tuple[Failure | None, Progress | None]]:
        """Pull the model to this machine; yield progress, or a failure as the last thing."""
        reports: asyncio.Queue[Progress | None] = asyncio.Queue()
        fetching = asyncio.create_task(self._store.fetch(spec, reports.put_nowait))
        fetching.add_done_callback(lambda _: reports.put_nowait(None))
        try:
            while (progress := await reports.get()) is not None:
                yield None, progress
            await fetching
        except HostlerError as error:
            yield (error.reason, error.message), None
        finally:
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)

    async def start_ticks(self, pid: int) -> int:
        """Return when a process started, which tells it from a later one of the same number; 0 when it is gone."""
        found = ProcessId.of(pid)
        return found.start_ticks if found else 0

    async def wait(self, pid: int, start_ticks: int, timeout_s: float) -> bool:
        """Wait until a process has ended; return whether it has."""
        return await asyncio.to_thread(ProcessId(pid, start_ticks).wait, timeout_s)

    async def end(self, pid: int, start_ticks: int, timeout_s: float) -> bool:
        """Kill a process and wait until it has ended; return whether it has."""
        return await asyncio.to_thread(ProcessId(pid, start_ticks).end, timeout_s)

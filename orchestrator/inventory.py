"""Devices as they come, go, and are used by others.

Above it: `scheduler.py`. Below it: `watching.py` for workers whose device is gone, the effects that watch and measure.
"""

from __future__ import annotations

import logging

from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.runtime import Runtime
from orchestrator.views import in_words
from orchestrator.watching import Watching

log = logging.getLogger(__name__)

FOREIGN_INTERVAL_S = 2.0
NOTICEABLE = 0.02
"""Share of a device by which other programs' use must change to be written down."""


class Inventory:
    """Every method is called by the scheduler's task and returns at once."""

    def __init__(self, runtime: Runtime, watching: Watching) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._watching = watching
        self._here = tuple(self._cluster.devices.values())
        self._sleep_budget_here = dict(self._cluster.sleep_budget_bytes)
        self._measured_at_s = float("-inf")
        self._told_bytes: dict[str, int] = {}

    def tick(self, now_s: float) -> None:
        """Measure what other programs hold, now and then."""
        if now_s - self._measured_at_s < FOREIGN_INTERVAL_S:
            return
        self._measured_at_s = now_s
        if any(device.total_bytes for device in self._cluster.devices.values()):
            self._runtime.run(self._measure())
        if any(self._cluster.sleep_budget_bytes.values()):
            self._runtime.run(self._measure_hosts())

    async def _measure(self) -> None:
        pids = {worker.pid for worker in self._cluster.workers.values()}
        reserved = {device: self._cluster.occupied_bytes(device) for device in self._cluster.devices}
        self._runtime.post(events.ForeignMeasured(await self._runtime.effects.measure_foreign(pids, reserved)))

    async def _measure_hosts(self) -> None:
        self._runtime.post(events.HostsMeasured(await self._runtime.effects.measure_hosts()))

    async def follow_nodes(self) -> None:
        """Have the devices of other machines come and go."""
        async for seen in self._runtime.effects.watch_nodes():
            if not seen.why:
                continue
            budget = self._sleep_budget_here | seen.sleep_budget_bytes
            self._runtime.post(events.DevicesChanged((*self._here, *seen.devices), seen.why, budget))

    def on_foreign(self, event: events.ForeignMeasured) -> bool:
        """Respect what other programs hold from now on. Always worth another try for those who wait."""
        self._cluster.foreign_bytes = event.foreign_bytes
        for device_id, num_bytes in event.foreign_bytes.items():
            device, before = self._cluster.devices.get(device_id), self._told_bytes.get(device_id, 0)
            if device is None or abs(num_bytes - before) < NOTICEABLE * device.total_bytes:
                continue
            self._told_bytes[device_id] = num_bytes
            why = f"other programs hold {in_words(num_bytes)}, before {in_words(before)}"
            self._runtime.journal.note(pb.EVENT_KIND_FOREIGN_MEMORY, why, device=device_id, num_bytes=num_bytes)
        return True

    def on_hosts(self, event: events.HostsMeasured) -> None:
        """Know from now on how much host memory there still is for sleepers."""
        self._cluster.host_spare_bytes = event.spare_bytes

    def on_devices_changed(self, event: events.DevicesChanged) -> bool:
        """Take the new devices in; those that are gone take their workers with them."""
        after = {device.id: device for device in event.devices}
        before = dict(self._cluster.devices)
        for device_id in before.keys() - after.keys():
            self._runtime.journal.note(pb.EVENT_KIND_DEVICE_LOST, event.why, device=device_id)
        for device_id in after.keys() - before.keys():
            self._runtime.journal.note(
                pb.EVENT_KIND_DEVICE_FOUND, event.why, device=device_id, num_bytes=after[device_id].budget_bytes
            )
        # A device that stays keeps its budget, which may have grown since it was found.
        self._cluster.devices = {device_id: before.get(device_id, device) for device_id, device in after.items()}
        self._cluster.sleep_budget_bytes = dict(event.sleep_budget_bytes)
        nodes = {device.node for device in after.values()}
        for worker in list(self._cluster.workers.values()):
            gone = any(part.device not in after for part in worker.parts) or worker.node not in nodes
            if gone:
                self._watching.lost(worker, f"its device is gone: {event.why}")
        self._runtime.publish()
        return True

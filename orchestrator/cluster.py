"""Sums and look-ups over the state: who is ready, what memory is held and promised, what the policy sees.

Above it: the scheduler's parts. Below it: `state.py` and the policy's views. It reads the clock from its callers.

The ledger is not stored but summed. *Occupied*: what any worker process may still hold, those on their way out
included; a spawn or a wake needs occupied room. *Committed*: what will be held once all who were told to give way
have done so, promises included; a plan needs committed room.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from hostler.errors import ModelNotFound

from orchestrator.devices import Device
from orchestrator.effects import Placement
from orchestrator.experience import Experience
from orchestrator.models import ModelSpec
from orchestrator.state import Job, Model, Worker, WorkerState
from orchestrator.views import ClusterView, DeviceView, HolderState, HolderView, NodeView, Part

_VIEW_STATES = {
    WorkerState.LOADING: HolderState.COMING,
    WorkerState.WAKING: HolderState.COMING,
    WorkerState.READY: HolderState.READY,
    WorkerState.ASLEEP: HolderState.ASLEEP,
}


@dataclass(slots=True)
class Cluster:
    """All state. Keys: models by public name, workers by generation, host memory for sleepers by node.

    `ending`: processes of an earlier orchestrator, by worker id, that nobody could take over; they hold their room
    until their end.
    """

    devices: dict[str, Device]
    models: dict[str, Model] = field(default_factory=dict)
    workers: dict[int, Worker] = field(default_factory=dict)
    foreign_bytes: dict[str, int] = field(default_factory=dict)
    sleep_budget_bytes: dict[str, int] = field(default_factory=dict)
    host_spare_bytes: dict[str, int] = field(default_factory=dict)
    experience: Experience = field(default_factory=Experience)
    apart: frozenset[str] = frozenset()
    generation: int = 0
    ending: dict[str, Placement] = field(default_factory=dict)

    # ------------------------------------------------------------ look-ups

    def resolve(self, name: str) -> Model | None:
        """Return the model of this name or alias, or whose adapter has this name."""
        if (model := self.models.get(name)) is not None and not model.leaving:
            return model
        return next((m for m in self.models.values() if name in m.spec.names and not m.leaving), None)

    def not_found(self, name: str) -> ModelNotFound:
        """Return the error for a name that nobody knows, with what the caller may have meant."""
        names = [name for model in self.models.values() if not model.leaving for name in model.spec.names]
        near = difflib.get_close_matches(name, names, n=1)
        if near:
            hint = f"Did you mean {near[0]!r}?"
        elif names:
            hint = f"Available: {', '.join(sorted(names)[:8])}."
        else:
            hint = "No model is configured."
        return ModelNotFound(f"The model {name[:200]!r} does not exist here. {hint}", param="model")

    def of(self, model: str, *states: WorkerState) -> list[Worker]:
        """Return a model's workers that are in one of these states."""
        return [w for w in self.workers.values() if w.model == model and w.state in states]

    def ready(self, model: str) -> list[Worker]:
        """Return a model's ready workers, oldest first."""
        return self.of(model, WorkerState.READY)

    def least_loaded(self, model: str) -> Worker | None:
        """Return the ready worker with the fewest requests; the newest of equals."""
        return min(self.ready(model), key=lambda w: (w.num_requests, -w.generation), default=None)

    def job(self, generation: int) -> tuple[Model, Job] | None:
        """Return the job of this generation and its model; None when it is over."""
        for model in self.models.values():
            if model.job is not None and model.job.generation == generation:
                return model, model.job
        return None

    def job_of_worker(self, worker: Worker) -> tuple[Model, Job] | None:
        """Return the job that a worker belongs to; None when it has come up, or was given up."""
        model = self.models.get(worker.model)
        if model is not None and model.job is not None and model.job.worker == worker.generation:
            return model, model.job
        return None

    def kind_for(self, spec: ModelSpec) -> str:
        """Return the kind of device that a model will go to: measurements hold for one kind."""
        pinned_to = self.devices.get(spec.device) if spec.device else None
        device = pinned_to or next(iter(self.devices.values()), None)
        return device.kind if device else "cpu"

    # ------------------------------------------------------------ the ledger

    def _promised(self) -> Iterable[Job]:
        return (m.job for m in self.models.values() if m.job and m.job.plan and not m.job.stage.started)

    def awaited(self, worker: Worker) -> bool:
        """Return whether a load is to wake this sleeper, or take its weights over: nobody may push it out meanwhile."""
        model = self.models.get(worker.model)
        plan = model.job.plan if model is not None and model.job is not None else None
        return plan is not None and worker.id in (plan.wake, plan.take_over)

    def usable_bytes(self, device: Device) -> int:
        """Return the budget less what other programs make unusable of it."""
        if not device.total_bytes:
            return device.budget_bytes
        return max(0, min(device.budget_bytes, device.total_bytes - self.foreign_bytes.get(device.id, 0)))

    def occupied_bytes(self, device: str) -> int:
        """Return what worker processes may hold now, the ones on their way out or to sleep included."""
        ending = (part for placement in self.ending.values() for part in placement.parts)
        held_bytes = sum(num_bytes for part, num_bytes in ending if part == device)
        return held_bytes + sum(w.bytes_on(device) for w in self.workers.values())

    def committed_bytes(self, device: str) -> int:
        """Return what will be held when everybody who was told to give way has done so."""
        held = sum(p.num_bytes for w in self.workers.values() for p in committed_parts(w) if p.device == device)
        promised = (p for job in self._promised() if job.plan for p in job.plan.parts)
        return held + sum(p.num_bytes for p in promised if p.device == device)

    def has_room(self, parts: Iterable[Part]) -> bool:
        """Return whether all parts fit into what no process holds now."""
        return all(
            (device := self.devices.get(part.device)) is not None
            and part.num_bytes <= self.usable_bytes(device) - self.occupied_bytes(part.device)
            for part in parts
        )

    def is_giving_way(self, device: str) -> bool:
        """Return whether somebody on the device is about to free memory there."""
        leaving = (WorkerState.RESTING, WorkerState.DRAINING, WorkerState.LOST)
        if any(part == device for placement in self.ending.values() for part, _ in placement.parts):
            return True
        return any(
            w.bytes_on(device) and (w.state in leaving or w.resizing_to is not None) for w in self.workers.values()
        )

    def sleep_used_bytes(self, node: str) -> int:
        """Return the host memory that sleepers hold, those on their way there included."""
        states = (WorkerState.RESTING, WorkerState.ASLEEP)
        return sum(w.sleep_bytes for w in self.workers.values() if w.node == node and w.state in states)

    def sleep_room_bytes(self, node: str) -> int:
        """Return what sleepers may hold: their budget, or what other programs left of a GPU machine's memory."""
        budget = self.sleep_budget_bytes.get(node, 0)
        if (spare := self.host_spare_bytes.get(node)) is None:
            return budget
        asleep = sum(w.sleep_bytes for w in self.workers.values() if w.node == node and w.state is WorkerState.ASLEEP)
        return max(0, min(budget, asleep + spare))

    def grow_budget(self, device: str, num_bytes: int) -> None:
        """Add to a budget that was measured while our own adopted worker already held part of the memory."""
        found = self.devices.get(device)
        if found is not None and found.kind == "cpu" and found.auto_budget:
            self.devices[device] = replace(found, budget_bytes=found.budget_bytes + num_bytes)

    # ------------------------------------------------------------ what the policy sees

    def view(self, now_s: float) -> ClusterView:
        """Return what the policy decides on."""
        holders = [
            self._holder(worker, self.models[worker.model], now_s)
            for worker in self.workers.values()
            if worker.state in _VIEW_STATES
        ]
        holders += [
            HolderView(
                id=f"job-{job.generation}",
                model=job.model,
                parts=job.plan.parts,
                state=HolderState.COMING,
                busy=True,
                last_used_s=now_s,
                group=self.models[job.model].spec.group,
            )
            for job in self._promised()
            if job.plan
        ]
        resting = [w for w in self.workers.values() if w.state is WorkerState.RESTING]
        nodes = {node: self.sleep_room_bytes(node) for node in self.sleep_budget_bytes}
        for worker in resting:  # Their host memory is spoken for, though they are no holders any more.
            if worker.node in nodes:
                nodes[worker.node] = max(0, nodes[worker.node] - worker.sleep_bytes)
        return ClusterView(
            devices=tuple(DeviceView(d.id, self.usable_bytes(d), d.node) for d in self.devices.values()),
            holders=tuple(holders),
            nodes=tuple(NodeView(node, num_bytes) for node, num_bytes in nodes.items()),
            now_s=now_s,
            apart=self.apart,
        )

    def _holder(self, worker: Worker, model: Model, now_s: float) -> HolderView:
        spec = model.spec
        times = self.experience.expect(spec, worker.located, worker.kind)
        return HolderView(
            id=worker.id,
            model=worker.model,
            parts=committed_parts(worker),
            state=_VIEW_STATES[worker.state],
            busy=worker.state in (WorkerState.LOADING, WorkerState.WAKING)
            or worker.num_requests > 0
            or now_s < worker.busy_until_s,
            pinned=model.pinned or self.awaited(worker),
            last_used_s=worker.used_at_s,
            ready_since_s=worker.ready_at_s,
            spare_bytes=spare_bytes(worker),
            sleep_bytes=worker.sleep_bytes if self.sleep_budget_bytes.get(worker.node) else None,
            load_s=times.load_s,
            wake_s=times.wake_s,
            hand_over_s=times.hand_over_s if worker.shelf else None,
            uses_per_s=model.reuse.per_s(now_s),
            lasting_per_s=model.reuse.lasting_per_s(now_s),
            group=spec.group,
            batch=model.batch,
            node=worker.node,
            # Several devices, or a GPU: the process was pinned to them when it loaded.
            wakes_on=worker.home if worker.kind == "cuda" or len(worker.home) > 1 else None,
        )

    def num_others(self, name: str) -> int:
        """Return how many configured models beside this one are not resident yet and will want memory."""
        resident = {w.model for w in self.workers.values() if w.state.stays or w.state is WorkerState.ASLEEP}
        return sum(
            1
            for m in self.models.values()
            if m.spec.configured and m.spec.has_files and m.spec.name != name and m.spec.name not in resident
        )


def committed_parts(worker: Worker) -> tuple[Part, ...]:
    """Return what a worker will hold on its devices once it has done what it was told."""
    if not worker.state.stays:
        return ()
    if worker.resizing_to is None or worker.resizing_to >= worker.kv_cache_bytes or len(worker.parts) != 1:
        return worker.parts
    part = worker.parts[0]
    return (Part(part.device, part.num_bytes - (worker.kv_cache_bytes - worker.resizing_to)),)


def spare_bytes(worker: Worker) -> int:
    """Return what a worker's KV cache can give up for a neighbour."""
    if worker.state is not WorkerState.READY or len(worker.parts) != 1 or worker.resizing_to is not None:
        return 0
    held = worker.report.kv_used_bytes if worker.report and worker.num_requests else 0
    return max(0, worker.kv_cache_bytes - max(worker.kv_keep_bytes, held))

"""The world that orchestrators come and go in: devices, processes, requests, the store, what one life leaves the next.

Above it: the effects and the walk. Below it: processes. It knows nothing of the scheduler, and nothing here obeys it
but by what its effects ask for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from hostler.lifecycle.v1 import lifecycle_pb2 as life

from orchestrator.devices import Device
from orchestrator.effects import Memory
from orchestrator.experience import Experience
from orchestrator.models import Footprint, Located, ModelSpec

from .fates import Fate, Fates
from .loop import VirtualLoop
from .process import Phase, Process
from .shapes import MB, Kind, Shape

BEAT_S = 0.5


@dataclass(slots=True, eq=False)
class Birth:
    """A process that is being started; it comes into the world even if nobody waits for it any more."""

    process: Process
    stillborn: bool = False
    born: bool = False


class World:
    """Everything that is, apart from the orchestrator.

    Attributes:
        breaches: what the scheduler did that it must never do, first things first.
        generations: those that a worker was loaded under; `earlier_generation` is the newest of earlier lives.
        is_leaving: whether the scheduler has sent a worker away, by its id; it may not have been told yet.
        num_attempts: how often each model was loaded or woken.
    """

    def __init__(self, loop: VirtualLoop, shape: Shape, chance: random.Random) -> None:
        self.loop, self.shape, self.chance = loop, shape, chance
        self.fates = Fates(chance)
        self.kinds: dict[str, Kind] = {kind.name: kind for kind in shape.kinds}
        self.all_devices = {device.id: device for device in shape.found_devices()}
        self.lost_devices: set[str] = set()
        self.foreign_mb: dict[str, int] = dict.fromkeys((*self.all_devices, ""), 0)  # "": of the machine's own memory
        self.processes: dict[str, Process] = {}
        self.births: dict[str, Birth] = {}
        self.stored = {kind.name for kind in shape.kinds if kind.stored}
        self.listed: dict[str, ModelSpec] = {spec.name: spec for spec in shape.found_in_store()}
        self.memory = Memory()
        self.experience = Experience()
        self.breaches: list[tuple[str, str]] = []
        self.generations: set[int] = set()
        self.earlier_generation = 0
        self.num_attempts: dict[str, int] = dict.fromkeys(self.kinds, 0)
        self.num_ids = 0
        self.trace: list[str] | None = None
        self.is_leaving: Callable[[str], bool] = lambda worker_id: False
        self._beat_timer = loop.call_later(BEAT_S, self._beat)

    # ------------------------------------------------------------ words

    def tell(self, text: str) -> None:
        """Write a line of the trace, when somebody wants one."""
        if self.trace is not None:
            self.trace.append(f"{self.loop.time() - 1000.0:9.2f}  {text}")

    def kind_for(self, request: life.LoadRequest) -> Kind:
        """Return what is to be loaded. What it is to be taken over from sleeps and is the same, or has died."""
        sleeper = self.processes.get(request.shelf)
        if sleeper is not None and (sleeper.model != request.model or sleeper.phase is not Phase.ASLEEP):
            found = f"{sleeper.id} ({sleeper.model}, {sleeper.phase.value})"
            self.breach("only sleepers are taken over", f"{request.model} was to be taken over from {found}")
        return self.kinds[request.model]

    def breach(self, invariant: str, text: str) -> None:
        """Write down that the scheduler did what it must not."""
        self.breaches.append((invariant, text))
        self.tell(f"*** {invariant}: {text}")

    # ------------------------------------------------------------ devices and the store

    @property
    def devices(self) -> dict[str, Device]:
        """Those that are there now."""
        return {key: device for key, device in self.all_devices.items() if key not in self.lost_devices}

    def sleep_budgets(self) -> dict[str, int]:
        return {"": self.shape.sleep_mb * MB}

    def foreign_bytes(self) -> dict[str, int]:
        return {device: self.foreign_mb[device] * MB for device in self.devices}

    def host_spare_bytes(self) -> dict[str, int]:
        """Return what is left of the host memory for sleepers once other programs have taken theirs."""
        held = sum(p.kind.own_bytes for p in self.processes.values() if p.kind and p.phase is Phase.ASLEEP)
        return {"": (self.shape.sleep_mb - self.foreign_mb[""]) * MB - held}

    def locate(self, name: str) -> Located | None:
        """Return the files of a model, if they are here."""
        footprint: Footprint = self.kinds[name].footprint
        return Located(f"/models/{name}", footprint) if name in self.stored else None

    # ------------------------------------------------------------ processes

    def _beat(self) -> None:
        for process in list(self.processes.values()):
            process.beat()
        self._beat_timer = self.loop.call_later(BEAT_S, self._beat)

    def bear(self, worker_id: str, node: str, seconds: float, then: Callable[[Process], None]) -> Birth:
        """Start a process; `then` is called when it is up, unless it was ended before."""
        self.num_ids += 1
        birth = Birth(Process(self.loop, worker_id, node, 1000 + self.num_ids))
        self.births[worker_id] = birth

        def born() -> None:
            if birth.stillborn or birth.born:
                return
            birth.born = True
            self.births.pop(worker_id, None)
            self.processes[worker_id] = birth.process
            then(birth.process)

        self.loop.call_later(seconds, born)
        return birth

    def end(self, process: Process) -> None:
        """End a process, whatever it does."""
        if process.alive:
            self.tell(f"      process {process.id} ({process.model or 'blank'}) is gone")
            self.processes.pop(process.id, None)
            process.die()

    def afflict(self, process: Process, fate: Fate) -> None:
        """Let a fate come over a process in the middle of what it does."""
        process.unsound = True
        if fate is Fate.DIES:
            self.end(process)
        elif fate is Fate.FREEZES:
            process.freeze()

    # ------------------------------------------------------------ requests

    def ask(self, process: Process, seconds: float) -> object | None:
        """Begin a request that takes so long; None when the process does not take it."""
        request = object()
        if not process.begin_request(request):
            return None

        def over() -> None:
            if process.frozen or process.hung:
                self.loop.call_later(1.0, over)
            else:
                process.end_request(request)

        self.loop.call_later(seconds, over)
        return request

    # ------------------------------------------------------------ the orchestrator's death

    def orphan(self) -> None:
        """Let what the dead orchestrator began come to its end: whoever was being born is there, and blank."""
        for birth in list(self.births.values()):
            if not birth.stillborn:
                birth.born = True
                self.processes[birth.process.id] = birth.process
        self.births.clear()
        self.earlier_generation = max(self.generations, default=0)

    def calm_down(self) -> None:
        """Undo what can be undone, and do no more harm from now on."""
        self.fates.calm = True
        self.lost_devices.clear()
        self.foreign_mb = dict.fromkeys(self.foreign_mb, 0)
        for process in list(self.processes.values()):
            if process.phase is not Phase.FAILED:
                process.thaw()

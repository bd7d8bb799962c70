"""Everything that can happen to a scheduler, as steps; each is drawn from a seed of its own and judged at once.

Above: the proof's tests and `make prove`. Below: the world, the truth. A step's seed decides what happens and what
becomes of its effects, so any step can be left out of a run: that lets `shrink.py` find short ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

from hostler.errors import HostlerError
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.state import Progress, WorkerState

from . import invariants
from .callers import Breach, Client, Life, ignoring_refusals, running
from .loop import Livelock, VirtualLoop
from .process import Phase, Process
from .shapes import SHAPES
from .truth import Complaints, Truth
from .world import World

TICK_S = 0.25
LAZY_TICK_S = 1.0  # As far apart as ticks may be before they count as late; for long waits.
REST_S = 3000.0  # Quiet for so long, everything has come to its end: a load that hangs, three times, and a drain.


class Walk:
    """One run of a world. Make it, step it, let it rest, close it.

    Raises, from every method that does something:
        Breach: an invariant does not hold.
    """

    def __init__(self, shape: int, trace: bool = False) -> None:
        self.chance = random.Random(0)
        self.loop = VirtualLoop()
        self.world = World(self.loop, SHAPES[shape % len(SHAPES)], self.chance)
        self.world.trace = [] if trace else None
        self.truth = Truth(self.world)
        self.clients: list[Client] = []
        self._calls: set[asyncio.Task[None]] = set()
        self.names = [*self.world.kinds]
        self._log = logging.getLogger("orchestrator")
        self._log_before = (self._log.level, self._log.propagate)
        self._log.propagate = False
        self._log.setLevel(logging.ERROR)
        self._complaints = Complaints(self.world)
        self._log.addHandler(self._complaints)
        # A process that was stopped and goes on is in the middle of something; the loop it ran in is this one.
        with running(self.loop):
            self.life = Life(self)

    def close(self) -> None:
        """End every task, so that nothing is left to be collected."""
        with contextlib.suppress(Livelock):
            self._end_life()
        self._log.removeHandler(self._complaints)
        self._log.setLevel(self._log_before[0])
        self._log.propagate = self._log_before[1]

    # ------------------------------------------------------------ steps

    def step(self, seed: int) -> None:
        """Let one thing happen, drawn from the seed."""
        self.chance.seed(seed)
        action = self.chance.choices(_ACTIONS, cum_weights=_CUMULATIVE)[0]
        self._do(action)

    def do(self, action: str, seed: int) -> None:
        """Let this happen, with everything about it drawn from the seed."""
        self.chance.seed(seed)
        self._do(getattr(Walk, action))

    def _do(self, action: Callable[[Walk], None]) -> None:
        try:
            with running(self.loop):
                action(self)
            self.loop.settle()
        except Livelock as error:
            self.world.breach("it comes to an end", str(error))
        self.clients = [client for client in self.clients if client.waits]
        self._judge(invariants.AFTER_STEPS)

    def _judge(self, what: tuple[tuple[str, Callable[[Walk], str | None]], ...]) -> None:
        if not self.world.breaches:
            for name, holds in what:
                if (text := holds(self)) is not None:
                    self.world.breach(name, text)
                    break
        if not self.world.breaches and self.loop.unhandled:
            self.world.breach("every effect says how it ended", repr(self.loop.unhandled[0])[:500])
        if self.world.breaches:
            raise Breach(*self.world.breaches[0])

    # ------------------------------------------------------------ time

    def pass_time(self, seconds: float, tick_s: float = TICK_S) -> None:
        """Let time pass, with the scheduler's ticks."""
        remaining_s = seconds
        while remaining_s > 1e-9 and not self.world.breaches:
            step_s = min(tick_s, remaining_s)
            remaining_s -= step_s
            self.loop.advance(step_s)
            self._tick(step_s)

    def _tick(self, step_s: float) -> None:
        for process in self.world.processes.values():
            if process.generation in self.truth.cluster.workers:
                process.tick(step_s if step_s <= LAZY_TICK_S else 0.5)
        self.life.scheduler.post(events.Tick())
        self.loop.settle()

    def time(self) -> None:
        self.world.tell("a moment passes")
        self.pass_time(self.chance.choice((0.05, 0.25, 0.25, 0.5, 1.0, 2.0)))

    def long_time(self) -> None:
        seconds = self.chance.choice((5.0, 10.0, 30.0, 70.0))
        self.world.tell(f"{seconds:g} s pass")
        self.pass_time(seconds, LAZY_TICK_S)

    def stall(self) -> None:
        """The orchestrator itself stands still, and the world goes on."""
        seconds = self.chance.uniform(1.1, 9.0)
        self.world.tell(f"the orchestrator stands still for {seconds:.1f} s")
        self.loop.jump(seconds)
        if self.chance.random() < 0.5:
            self._tick(seconds)
            self.loop.advance(0.0)
        else:
            self.loop.advance(0.0)
            self._tick(seconds)

    # ------------------------------------------------------------ callers

    def arrive(self) -> None:
        """Somebody wants a model; a few at once, sometimes."""
        model = self.chance.choice(self.names)
        batch, explicit = self.chance.random() < 0.2, self.chance.random() < 0.05
        for _ in range(self.chance.choice((1, 1, 1, 2, 5))):
            self.world.tell(
                f"a client comes for {model}{' (batch)' if batch else ''}{' (explicit)' if explicit else ''}"
            )
            seconds = self._request_s()
            self.clients.append(Client(self, model, batch=batch, explicit=explicit, seconds=seconds))

    def _request_s(self) -> float:
        if self.world.fates.calm:
            return 0.1
        return self.chance.choice((0.0, 0.2, 1.0, 4.0, self.chance.expovariate(0.1)))

    def leave(self) -> None:
        """Somebody's patience ends."""
        waiting = [client for client in self.clients if client.waits]
        if waiting:
            client = self.chance.choice(waiting)
            self.world.tell(f"a client of {client.model} leaves")
            client.task.cancel()

    def send(self, replica: pb.Replica, seconds: float) -> None:
        """Send a request to a replica, as a gateway does; it may not be taken."""
        process = self.world.processes.get(replica.id)
        if process is not None and process.generation == replica.generation:
            self.world.ask(process, seconds)

    def send_by_route(self) -> None:
        """A request for a model that is up: no event tells the scheduler."""
        latest = self.truth.runtime.routes.latest
        replicas = [replica for route in latest.models for replica in route.replicas] if latest else []
        if replicas:
            replica = self.chance.choice(replicas)
            self.world.tell(f"a request goes to {replica.id}")
            self.send(replica, self._request_s())

    # ------------------------------------------------------------ faults

    def _any_process(self) -> Process | None:
        living = list(self.world.processes.values())
        return self.chance.choice(living) if living else None

    def crash(self) -> None:
        """A process dies."""
        if (process := self._any_process()) is not None:
            self.world.tell(f"{process.id} crashes")
            self.world.end(process)

    def freeze(self) -> None:
        """A process stops, or hangs in the middle of a step."""
        if (process := self._any_process()) is None:
            return
        if self.chance.random() < 0.6:
            self.world.tell(f"{process.id} freezes")
            process.freeze()
        else:
            self.world.tell(f"{process.id} hangs")
            process.hung = process.unsound = True

    def thaw(self) -> None:
        """One that stood still goes on, whatever became of it."""
        frozen = [p for p in self.world.processes.values() if p.frozen or p.hung]
        if frozen:
            process = self.chance.choice(frozen)
            self.world.tell(f"{process.id} goes on")
            process.thaw()

    def fail(self) -> None:
        """A process says that it is broken, or a network breaks its stream."""
        if (process := self._any_process()) is None:
            return
        if process.phase is Phase.READY and self.chance.random() < 0.5:
            self.world.tell(f"{process.id} fails")
            process.unsound = True
            process.become(Phase.FAILED)
        else:
            self.world.tell(f"the streams of {process.id} break")
            process.break_streams()

    def foreign(self) -> None:
        """Other programs take memory, of a device or of the machine, or give it back."""
        device = self.chance.choice(sorted(self.world.foreign_mb))
        amount = self.chance.choice((0, 0, 20, 60, 150, 400, 900))
        self.world.tell(f"other programs hold {amount} MiB of {device or 'the machine'}")
        self.world.foreign_mb[device] = amount

    def devices(self) -> None:
        """A device falls off the bus, or is back."""
        world = self.world
        device = self.chance.choice(sorted(world.all_devices))
        if device in world.lost_devices:
            world.lost_devices.discard(device)
        else:
            world.lost_devices.add(device)
        self._tell_devices(f"{device} {'is gone' if device in world.lost_devices else 'is back'}")

    def _tell_devices(self, why: str) -> None:
        world = self.world
        world.tell(why)
        for process in world.processes.values():
            if world.lost_devices.intersection(process.devices):
                process.unsound = True
        self.life.scheduler.post(events.DevicesChanged(tuple(world.devices.values()), why, world.sleep_budgets()))

    def store(self) -> None:
        """Files come or go by hand, and the store is read again."""
        name = self.chance.choice(self.names)
        if self.world.kinds[name].options is None and self.chance.random() < 0.5:
            if self.world.listed.pop(name, None) is None:
                self.world.listed = {spec.name: spec for spec in self.world.shape.found_in_store()}
            self.world.tell(f"the store lists {', '.join(self.world.listed) or 'nothing'}")
            self.life.scheduler._requests.rescan()
        else:
            self.world.tell(f"the files of {name} {'go' if name in self.world.stored else 'come'}")
            self.world.stored ^= {name}

    def stale(self) -> None:
        """A message comes that is of no use to anybody any more."""
        event = self._stale_event()
        if event is not None:
            self.world.tell(f"late: {event!r}"[:160].replace("\n", " "))
            self.life.scheduler.post(event)

    def _stale_event(self) -> events.Event | None:
        over, chance = self.truth.over, self.chance
        if not over:
            return None
        old = chance.choice(list(over))
        said = life.WatchResponse(state=life.WORKER_STATE_READY, generation=old, num_running=chance.choice((0, 3)))
        workers = self.truth.cluster.workers
        if workers and chance.random() < 0.2:  # A living worker's stream brings what its predecessor said.
            return events.Reported(chance.choice(sorted(workers)), said)
        return chance.choice(
            (
                events.LocateDone(old, self.world.locate(self.names[0])),
                events.FetchDone(old),
                events.LoadDone(old, life.ModelInfo()),
                events.LoadDone(old, None, HostlerError("late")),
                events.WakeDone(old),
                events.SleepDone(old, 1, 1),
                events.ResizeDone(old, 1, "late"),
                events.Progressed(old, Progress("read")),
                events.Reported(old, said),
                events.WatchEnded(old, "late"),
                events.Retired(old),
            )
        )

    # ------------------------------------------------------------ operators

    def operate(self) -> None:
        """An operator unloads, puts to sleep, pins, asks."""
        scheduler, model = self.life.scheduler, self.chance.choice(self.names)
        what = self.chance.choice(("unload", "sleep", "pin", "unpin", "unpin", "plan", "status"))
        self.world.tell(f"an operator: {what} {model}")
        calls = {
            "unload": lambda: scheduler.unload(model),
            "sleep": lambda: scheduler.sleep(model),
            "pin": lambda: scheduler.pin(model, pinned=True),
            "unpin": lambda: scheduler.pin(model, pinned=False),
            "plan": lambda: scheduler.plan(model),
            "status": scheduler.status,
        }
        self._calls.add(task := self.loop.create_task(ignoring_refusals(calls[what]())))
        task.add_done_callback(self._calls.discard)

    # ------------------------------------------------------------ the orchestrator's end

    def restart(self) -> None:
        """The orchestrator is killed and started again; its clients fall with it, its workers do not."""
        self.world.tell("the orchestrator is killed, and started again")
        self._end_life()
        self.world.orphan()
        self.life = Life(self)

    def _end_life(self) -> None:
        self.life.effects.dead = True
        for client in self.clients:
            client.task.cancel()
        for call in self._calls:
            call.cancel()
        self.life.task.cancel()
        self.loop.settle()
        self.clients.clear()
        for process in self.world.processes.values():
            process.streams.clear()

    def stop(self) -> None:
        """The orchestrator is asked to stop; in the end another one is started."""
        self.world.tell("the orchestrator is stopped")
        self.life.scheduler.post(events.Stop())
        self.loop.settle()
        waited_s = 0.0
        while not self.life.task.done() and waited_s < REST_S and not self.world.breaches:
            waited_s += LAZY_TICK_S
            self.pass_time(LAZY_TICK_S, LAZY_TICK_S)
        if not self.life.task.done():
            self.world.breach("a stop ends", f"not within {REST_S:g} s")
        self.restart()

    # ------------------------------------------------------------ rest

    def rest(self) -> None:
        """Let the world be quiet, and see that everybody was answered and nothing is left over."""
        self.world.tell("the world is quiet from now on")
        self.world.calm_down()
        with running(self.loop):
            self._tell_devices("every device is there")
        quiet_s = waited_s = 0.0
        while quiet_s < 5.0 and waited_s < REST_S and not self.world.breaches:
            with running(self.loop):
                self.pass_time(LAZY_TICK_S, LAZY_TICK_S)
            waited_s += LAZY_TICK_S
            quiet_s = quiet_s + LAZY_TICK_S if self._is_quiet() else 0.0
        self._judge(invariants.AT_REST)
        if quiet_s < 5.0:
            raise Breach("it comes to rest", f"not within {REST_S:g} s")
        self._judge(invariants.AFTER_STEPS)
        self.world.fates.calm = False

    def _is_quiet(self) -> bool:
        cluster = self.truth.cluster
        steady = (WorkerState.READY, WorkerState.ASLEEP)
        return (
            self.life.effects.has_taken_stock
            and not (cluster.ending or any(client.waits for client in self.clients))
            and not any(model.job is not None for model in cluster.models.values())
            and all(worker.state in steady and worker.resizing_to is None for worker in cluster.workers.values())
            and not self.life.awaits_processes
            and not any(p.doomed or p.requests for p in self.world.processes.values())
        )


_WEIGHTS: tuple[tuple[Callable[[Walk], None], float], ...] = (
    (Walk.time, 40),
    (Walk.arrive, 22),
    (Walk.send_by_route, 10),
    (Walk.leave, 3),
    (Walk.long_time, 1.5),
    (Walk.stall, 0.7),
    (Walk.crash, 1.5),
    (Walk.freeze, 1.5),
    (Walk.thaw, 2),
    (Walk.fail, 1),
    (Walk.foreign, 2),
    (Walk.devices, 0.8),
    (Walk.store, 1),
    (Walk.stale, 8),
    (Walk.operate, 4),
    (Walk.restart, 1),
    (Walk.stop, 0.1),
)
_ACTIONS = [action for action, _ in _WEIGHTS]
_CUMULATIVE = [sum(weight for _, weight in _WEIGHTS[: i + 1]) for i in range(len(_WEIGHTS))]

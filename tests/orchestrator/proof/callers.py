"""Who lives beside the world: callers, each life of the orchestrator, and what a broken invariant is told as.

Above it: the walk. Below it: the real scheduler, the effects.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from hostler.errors import HostlerError

from orchestrator.scheduler import Scheduler

from .effects import WorldEffects
from .loop import VirtualLoop

if TYPE_CHECKING:
    from .walk import Walk


class Breach(Exception):
    """An invariant does not hold.

    Attributes:
        invariant: its name.
    """

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


class Client:
    """One caller: it waits for a model, then sends one request to the replica that it was given."""

    def __init__(self, walk: Walk, model: str, *, batch: bool, explicit: bool, seconds: float) -> None:
        self.model = model
        self.num_attempts_before = walk.world.num_attempts[model]
        self.task = walk.loop.create_task(self._run(walk, batch, explicit, seconds))

    @property
    def waits(self) -> bool:
        return not self.task.done()

    async def _run(self, walk: Walk, batch: bool, explicit: bool, seconds: float) -> None:
        stream = walk.life.scheduler.ensure(self.model, explicit=explicit, batch=batch)
        try:
            async for event in stream:
                if event.HasField("ready"):
                    walk.send(event.ready, seconds)
        except HostlerError as error:
            walk.world.tell(f"    ← {self.model}: {error.message}")
        finally:
            await stream.aclose()  # type: ignore[attr-defined]


class Life:
    """One orchestrator."""

    def __init__(self, walk: Walk) -> None:
        world = walk.world
        self.effects = WorldEffects(world)
        self.scheduler = Scheduler(
            world.shape.config, tuple(world.devices.values()), self.effects, world.sleep_budgets()
        )
        walk.truth.attach(self.scheduler)
        self.task = walk.loop.create_task(self.scheduler.run())
        self._births = world.births

    @property
    def awaits_processes(self) -> bool:
        """Whether some are on their way, or will turn out not to be."""
        return bool(self._births) or not all(blank.pid for blank in self.scheduler._pool._blanks.values())


async def ignoring_refusals(call: object) -> None:
    """Wait for a call that may be refused."""
    with contextlib.suppress(HostlerError):
        await call  # type: ignore[misc]


@contextlib.contextmanager
def running(loop: VirtualLoop):  # type: ignore[no-untyped-def]
    """Make the loop the running one, for what asks for it outside of its callbacks."""
    before = asyncio._get_running_loop()
    asyncio._set_running_loop(loop)
    try:
        yield
    finally:
        asyncio._set_running_loop(before)

"""The orchestrator process: `python -m orchestrator --run-dir DIR`. Serves placement on DIR/orchestrator.sock.

Above it: `hostler serve`, which restarts it when it dies. Below it: the service, the scheduler, the real effects.

SIGTERM is a full stop: running requests end (up to `drain_s`), workers are unloaded, exit 0. Any other death
leaves the workers alive, and the next orchestrator adopts them. When Ray's owner dies it exits with status 3.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from hostler import logs
from hostler.channel import new_server
from hostler.config import HostlerConfig, read_resolved, stamp_of
from hostler.placement.v1 import placement_pb2_grpc
from hostler.rundir import RunDir

from orchestrator import devices, events
from orchestrator.effects_ray import ACTOR_CLASS, RayEffects
from orchestrator.ray_session import RaySession
from orchestrator.scheduler import Scheduler
from orchestrator.service import PlacementService

log = logging.getLogger(__name__)

TICK_S = 0.25
EXIT_RAY_LOST = 3


async def _tick(scheduler: Scheduler, configuration: ConfigFile) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        if (config := configuration.changed()) is not None:
            scheduler.post(events.Reconfigured(config))
            await scheduler.status()  # It comes behind the other in the queue.
            configuration.tell_taken()
        scheduler.post(events.Tick())


class ConfigFile:
    """The resolved configuration of this run, which `hostler serve` replaces while we run.

    A file rather than a signal: nothing is missed while we start, and Ray's signal handlers have no part in it.
    """

    def __init__(self, path: Path, taken: Path) -> None:
        self._path = path
        self._taken = taken
        self._stamp = stamp_of(self._path)

    def read(self) -> HostlerConfig:
        """Return the configuration."""
        return read_resolved(self._path)

    def tell_taken(self) -> None:
        """Tell `hostler serve` that what was read last is in force."""
        self._taken.write_text(self._stamp, encoding="ascii")

    def changed(self) -> HostlerConfig | None:
        """Return the configuration if it is another than the last time; None too when it cannot be read."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            return self.read()
        except (OSError, ValueError):
            log.exception("the new configuration cannot be read; the old one stays")
            return None


async def _connect_and_guard(effects: RayEffects) -> None:
    """Become Ray's driver; return when the process that owns Ray has died."""
    session: RaySession = await effects.connect()
    log.info("connected to Ray")
    gone = asyncio.Event()
    if session.pid:
        try:
            descriptor = os.pidfd_open(session.pid)
        except ProcessLookupError:
            return
        asyncio.get_running_loop().add_reader(descriptor, gone.set)
    await gone.wait()


async def serve(run_dir: RunDir, actor_class: str = ACTOR_CLASS) -> int:
    """Serve until stopped; return the exit status."""
    configuration = ConfigFile(
        run_dir.config, run_dir.config_taken
    )  # It looks before we read, so that no change is missed.
    config = configuration.read()
    effects = RayEffects(config, run_dir, actor_class)
    # First of all: Ray's import takes half a second in its thread, everything below goes beside it.
    guard = asyncio.create_task(_connect_and_guard(effects))
    found = await asyncio.to_thread(devices.discover, devices.configured_on("", config.devices))
    effects.use_devices(found)
    sleep_budget = devices.sleep_budget_bytes(config.sleep_memory, found)
    scheduler = Scheduler(config, found, effects, {"": sleep_budget})

    server = new_server()
    placement_pb2_grpc.add_PlacementServiceServicer_to_server(PlacementService(scheduler), server)
    run_dir.orchestrator_socket.unlink(missing_ok=True)
    server.add_insecure_port(run_dir.orchestrator_target)
    await server.start()
    configuration.tell_taken()
    run_dir.orchestrator_socket.chmod(0o600)

    def catch_signals() -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, scheduler.post, events.Stop())

    catch_signals()
    effects.on_connected(catch_signals)  # Again: Ray's core puts a handler that prints a stack over ours.
    log.info("serving", extra={"devices": [device.id for device in found]})
    scheduling = asyncio.create_task(scheduler.run())
    ticking = asyncio.create_task(_tick(scheduler, configuration))
    status = 0
    try:
        done, _ = await asyncio.wait({scheduling, guard, ticking}, return_when=asyncio.FIRST_COMPLETED)
        if scheduling not in done:
            status = EXIT_RAY_LOST
            log.error("Ray is lost", exc_info=next(iter(done)).exception())
    finally:
        for task in (ticking, scheduling, guard):
            task.cancel()
        await asyncio.gather(ticking, scheduling, guard, return_exceptions=True)
        await server.stop(grace=0.2)
        run_dir.orchestrator_socket.unlink(missing_ok=True)
    return status


async def _serve_and_exit(run_dir: RunDir) -> NoReturn:
    """Serve, then end the process from inside the loop.

    Leaving the loop in the ordinary way would wait for threads that hang in calls to a control plane that is
    gone, and Ray's own exit hooks likewise. Workers are detached and live on.
    """
    status = 1
    try:
        status = await serve(run_dir)
    except Exception:
        log.exception("the orchestrator failed")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)


def main() -> NoReturn:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator", description="Place models on devices.")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory of the server")
    options = parser.parse_args()
    logs.configure()
    asyncio.run(_serve_and_exit(RunDir(options.run_dir)))
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main()

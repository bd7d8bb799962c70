"""The store of responses and conversations, for the event loop. Above: `answer`, `background`; below: `database`.

Opened when it is first used, in the one thread that then does all its work, so that no query ever holds the loop.
Whoever follows a response of this process is woken by its writes; those of another are seen by looking again.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from gateway.responses.database import Database, MakeEnding, Stored, is_live
from gateway.responses.errors import StoreUnavailable
from gateway.responses.rows import Limits
from gateway.responses.runners import Runner
from gateway.responses.schema import open_database

log = logging.getLogger(__name__)

FILE_NAME = "responses.db"
LOOK_AGAIN_S = 0.1
"""How often the events of another process are looked for, and how soon its word to stop is heard."""
_EVENTS_AT_ONCE = 512

P = ParamSpec("P")
T = TypeVar("T")


class ResponseStore:
    """One for each process.

    Args:
        directory: where the database lies; None for one of this process alone, gone with it.
        limits: what it may hold.
        look_again_s: as `LOOK_AGAIN_S`.
        clock: tells Unix seconds.
    """

    def __init__(
        self,
        directory: Path | None,
        limits: Limits,
        *,
        look_again_s: float = LOOK_AGAIN_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._clock = clock
        self.look_again_s = look_again_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses")
        self._temporary: Path | None = None
        self._database: Database | None = None
        self._runner: Runner | None = None
        self._news: dict[str, asyncio.Event] = {}
        self.active: set[str] = set()
        """Responses that this process works on; written by `background` alone."""

    @property
    def is_on(self) -> bool:
        """Whether anything is stored at all."""
        return self._limits.max_records > 0 and self._limits.max_bytes > 0

    async def run(self, work: Callable[Concatenate[Database, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one of `Database`'s methods in the store's thread.

        Raises:
            HostlerError: as the method says.
            StoreUnavailable: the database fails: disk full, locked for long, damaged.
        """

        def in_thread() -> T:
            return work(self._opened()[0], *args, **kwargs)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, in_thread)
        except (sqlite3.Error, OSError) as error:
            log.error("the store of responses failed", exc_info=error)
            raise StoreUnavailable from None

    async def runner_name(self) -> str:
        """Return the name under which this process works on responses."""

        def in_thread() -> str:
            return self._opened()[1].name

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, in_thread)
        except (sqlite3.Error, OSError) as error:
            log.error("the store of responses failed", exc_info=error)
            raise StoreUnavailable from None

    async def get(self, owner: str, response_id: str, when_dead: MakeEnding) -> Stored:
        """Return a response; one whose process has died is ended first.

        Args:
            when_dead: makes the end of such a one.

        Raises:
            NotStored: there is none.
        """

        def read(database: Database) -> Stored:
            self._look(database, owner, response_id, when_dead)
            return database.get(owner, response_id)

        return await self.run(read)

    async def follow(
        self, owner: str, response_id: str, after: int, when_dead: MakeEnding
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yield the frames of a response with numbers above `after`, as they come, to its last one.

        Raises:
            NotStored: there is none, or it was deleted meanwhile.
        """

        def look(database: Database, after: int) -> tuple[bool, list[tuple[int, bytes]]]:
            # The state first: of what has ended by then, all events are there.
            runs = self._look(database, owner, response_id, when_dead)
            return runs, database.events_after(owner, response_id, after, _EVENTS_AT_ONCE)

        try:
            while True:
                news = self._news.setdefault(response_id, asyncio.Event())
                runs, frames = await self.run(look, after)
                for number, frame in frames:
                    after = number
                    yield number, frame
                if len(frames) == _EVENTS_AT_ONCE:
                    continue
                if not runs:
                    return
                try:
                    async with asyncio.timeout(self.look_again_s):
                        await news.wait()
                except TimeoutError:
                    pass
        finally:
            self._news.pop(response_id, None)

    def _look(self, database: Database, owner: str, response_id: str, when_dead: MakeEnding) -> bool:
        """Return whether a response runs; end it first if its process has died."""
        status, runner = database.state(owner, response_id)
        if is_live(status) and not self._is_worked_on(response_id, runner):
            log.warning("a background response lost its process", extra={"response_id": response_id})
            status = database.end(owner, response_id, when_dead).status
        return is_live(status)

    def _is_worked_on(self, response_id: str, runner_name: str | None) -> bool:
        runner = self._opened()[1]
        if runner_name == runner.name:
            return response_id in self.active
        return runner_name is not None and runner.lives(runner_name)

    def announce(self, response_id: str) -> None:
        """Wake who follows a response here."""
        news = self._news.pop(response_id, None)
        if news is not None:
            news.set()

    async def close(self) -> None:
        """Close the database; afterwards, other processes see this one as dead."""

        def in_thread() -> None:
            if self._runner is not None:
                self._runner.close()
            if self._database is not None:
                self._database.close()
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)

        await asyncio.get_running_loop().run_in_executor(self._thread, in_thread)
        self._thread.shutdown(wait=False)

    def _opened(self) -> tuple[Database, Runner]:
        """Return the database; in the store's thread only."""
        if self._database is None or self._runner is None:
            directory = self._directory
            if directory is None:
                directory = self._temporary = Path(tempfile.mkdtemp(prefix="hostler-"))
            path = directory / FILE_NAME
            connection = open_database(path)
            self._database = Database(connection, self._limits, self._clock)
            self._runner = Runner(path)
        return self._database, self._runner

"""Responses that outlive their client's connection. Above: routes, `services`; below: `answer`, `store`.

Each runs as a task of the process that was asked, and writes its events to the store as they come, a few at a time. So
any process can tell how far it is, follow it, and end it: the runner notices at its next write or look. If the process
dies, whoever asks next ends the response as failed.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, suppress
from typing import Any

from hostler.errors import HostlerError, Overloaded, Unavailable

from gateway.dialects.openai_responses.endings import failed
from gateway.dialects.openai_responses.output_items import Event
from gateway.dispatch import Loading
from gateway.errors import as_hostler_error
from gateway.lifetime import Lifetime
from gateway.responses.answer import ENDINGS, Answer
from gateway.responses.database import Database
from gateway.responses.store import ResponseStore
from gateway.sse import event_frame

log = logging.getLogger(__name__)

MAX_RUNNING = 256
"""In one process, waiting for a model included."""
# How long events are gathered before they are written.
_GATHER_S = 0.02


class BackgroundRuns:
    """All background responses of this process. For the event loop's thread only."""

    def __init__(self, store: ResponseStore, lifetime: Lifetime, max_running: int = MAX_RUNNING) -> None:
        self._store = store
        self._lifetime = lifetime
        self._max_running = max_running
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, answer: Answer) -> dict[str, Any]:
        """Begin a response and return its object, queued.

        Raises:
            Overloaded: too many run already.
            StoreUnavailable: it cannot be noted down.
        """
        if len(self._tasks) >= self._max_running:
            raise Overloaded(f"{len(self._tasks)} background responses are already running. Try again later.")
        runner = await self._store.runner_name()
        response_id = answer.response_id
        response = answer.builder.snapshot()
        frames = [_numbered_frame(event) for event in answer.builder.queue()]
        run = _Run(self._store, answer, self._lifetime)
        self._store.active.add(response_id)
        task = asyncio.create_task(run.to_the_end())
        self._tasks[response_id] = task
        task.add_done_callback(lambda _: self._forget(response_id))

        def note(database: Database) -> None:
            database.insert(answer.caller.owner, response, answer.inputs, runner)
            database.append(response_id, frames, "queued")

        try:
            await self._store.run(note)
        except BaseException:
            task.cancel()
            raise
        self._lifetime.own(task)
        run.noted.set()
        return response

    def stop(self, response_id: str) -> None:
        """Stop working on a response that has been ended, if it is one of this process."""
        if (task := self._tasks.get(response_id)) is not None:
            task.cancel()

    async def close(self, drain_s: float) -> None:
        """Let what runs finish for so long; what does not is told as failed."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=drain_s)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, response_id: str) -> None:
        self._tasks.pop(response_id, None)
        self._store.active.discard(response_id)
        self._store.announce(response_id)


class _Run:
    """One background response.

    Attributes:
        noted: set once the store knows of it.
    """

    def __init__(self, store: ResponseStore, answer: Answer, lifetime: Lifetime) -> None:
        self.noted = asyncio.Event()
        self._store = store
        self._answer = answer
        self._lifetime = lifetime
        # Of the events that are not written yet. The last ones wait for `_finish`, so that nobody sees a response end
        # and then finds it running.
        self._frames: list[tuple[int, bytes]] = []
        self._last_frames: list[tuple[int, bytes]] = []
        self._in_progress: dict[str, Any] | None = None
        self._fresh = asyncio.Event()

    async def to_the_end(self) -> None:
        """Answer, and write down whatever comes of it."""
        await self.noted.wait()
        request_id = self._answer.caller.request_id
        try:
            ending = await self._worked()
        except asyncio.CancelledError:
            # Ended by a client, and then nothing more is written; or its key has ended, or the server stops.
            why = self._lifetime.why_ended()
            if isinstance(why, Unavailable):
                why = Unavailable("The server stopped before the response was finished. Ask again.")
            ending = self._failed(why)
        except Exception as exception:
            error = as_hostler_error(exception, request_id=request_id)
            log.warning("background response failed", extra={"request_id": request_id, "reason": error.reason})
            ending = self._failed(error)
        if ending is not None:
            await self._finish(ending)

    async def _worked(self) -> dict[str, Any] | None:
        """Return the ended response; None when somebody else has ended it."""
        working = asyncio.create_task(self._generate())
        writing = asyncio.create_task(self._write_frames())
        try:
            await asyncio.wait((working, writing), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            writing.result()
            return None
        finally:
            for task in (working, writing):
                task.cancel()
            await asyncio.gather(working, writing, return_exceptions=True)

    async def _generate(self) -> dict[str, Any]:
        async with aclosing(self._answer.events()) as events:
            async for event in events:
                if isinstance(event, Loading):
                    continue
                if event["type"] in ENDINGS:
                    self._last_frames = [_numbered_frame(event)]
                    response: dict[str, Any] = event["response"]
                    return response
                if event["type"] == "response.in_progress":
                    self._in_progress = event["response"]
                self._frames.append(_numbered_frame(event))
                self._fresh.set()
        raise AssertionError("the worker's last event ends a response")

    async def _write_frames(self) -> None:
        """Write events as they come; return when the response has been ended or deleted by another."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._store.look_again_s):
                    await self._fresh.wait()
            if self._fresh.is_set():
                await asyncio.sleep(_GATHER_S)
            self._fresh.clear()
            frames, self._frames = self._frames, []
            response_id = self._answer.response_id
            try:
                if frames:
                    body, self._in_progress = self._in_progress, None
                    append = self._store.run(Database.append, response_id, frames, "in_progress", body)
                    runs = await asyncio.shield(append)
                    self._store.announce(response_id)
                else:
                    runs = await self._store.run(Database.still_runs, response_id)
            except HostlerError:
                # Perhaps the disk is full for a moment; the end will be tried once more.
                self._frames = [*frames, *self._frames]
                continue
            if not runs:
                return

    def _failed(self, error: HostlerError) -> dict[str, Any]:
        self._last_frames = [_numbered_frame(event) for event in self._answer.builder.fail(error)]
        return self._answer.builder.snapshot()

    async def _finish(self, ending: dict[str, Any]) -> None:
        owner, response_id = self._answer.caller.owner, self._answer.response_id
        try:
            # Once begun it must not be lost to the server's stop.
            await asyncio.shield(self._store.run(Database.finish, owner, ending, [*self._frames, *self._last_frames]))
        except Exception as exception:
            error = as_hostler_error(exception, request_id=self._answer.caller.request_id)
            # Told as failed if the store takes that; else whoever asks next finds that nobody works on it.
            with suppress(HostlerError):
                await self._store.run(Database.end, owner, response_id, failed(error))


def _numbered_frame(event: Event) -> tuple[int, bytes]:
    return event["sequence_number"], event_frame(event)

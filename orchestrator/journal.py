"""What happened and why: the latest events, remembered for those who ask and told to those who listen.

Above it: the scheduler's parts, which note; the service, which tells. Below it: the placement contract.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from hostler.placement.v1 import placement_pb2 as pb

MAX_REMEMBERED = 2000


class Journal:
    """The last `MAX_REMEMBERED` events. A slow listener skips what has fallen out, never blocks."""

    def __init__(self, unix_ms: Callable[[], int]) -> None:
        self._unix_ms = unix_ms
        self._events: deque[pb.WatchEventsResponse] = deque(maxlen=MAX_REMEMBERED)
        self._changed = asyncio.Event()
        self._number = 0
        self._counts: dict[tuple[pb.EventKind.ValueType, str], pb.EventCount] = {}

    @property
    def counts(self) -> list[pb.EventCount]:
        """How many events of each kind and model there were, those that are forgotten included."""
        return list(self._counts.values())

    def note(
        self,
        kind: pb.EventKind.ValueType,
        why: str,
        *,
        model: str = "",
        device: str = "",
        replica: str = "",
        num_bytes: int = 0,
        duration_s: float = 0.0,
    ) -> None:
        """Remember one event and tell it to every listener."""
        self._number += 1
        counted = self._counts.setdefault((kind, model), pb.EventCount(kind=kind, model=model))
        counted.count += 1
        counted.duration_ms += round(duration_s * 1000)
        self._events.append(
            pb.WatchEventsResponse(
                number=self._number,
                unix_ms=self._unix_ms(),
                kind=kind,
                model=model,
                device=device,
                replica=replica,
                num_bytes=max(0, num_bytes),
                duration_ms=round(duration_s * 1000),
                why=why,
            )
        )
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, max_past: int = 0, *, past_only: bool = False) -> AsyncIterator[pb.WatchEventsResponse]:
        """Yield past events, oldest first, then each new one; for ever unless `past_only`."""
        past = list(self._events)
        seen = self._number
        for event in past[-max_past:] if max_past else past:
            yield event
        while not past_only:
            changed = self._changed
            for event in [e for e in self._events if e.number > seen]:
                seen = event.number
                yield event
            await changed.wait()

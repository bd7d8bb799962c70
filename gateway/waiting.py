"""Who waits for a first token in this process: how many, with how many bytes, and for how long yet.

Above: `dispatch`; below: nothing. One event loop; the clock is the only effect. A request waits from its arrival to
its first token: for its model to come up, in the worker's queue, in prefill. All that time its body is kept, in case
it must go to another worker, so what waits is bounded by bytes as well as by number.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from hostler.errors import Overloaded
from hostler.words import duration, size

MIN_RETRY_S = 1.0
MAX_RETRY_S = 600.0
# A load whose length nobody knows yet.
UNKNOWN_LOAD_S = 5.0
# So many latest first tokens tell how fast the queue moves.
_NUM_STARTS = 64


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may wait in one process, in bytes of requests; a request that is alone always may."""

    max_bytes: int = 256 * 2**20
    max_model_bytes: int = 128 * 2**20


@dataclass(slots=True)
class _Queue:
    busy_since: float
    num_waiting: int = 0
    num_bytes: int = 0
    # While the model comes up: when that is expected to be over; None when nobody knows.
    is_loading: bool = False
    ready_at: float | None = None
    starts: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_STARTS))


class Place:
    """One request's place among those who wait; a context that gives it up at its end, if it was not before."""

    def __init__(self, room: WaitingRoom, model: str, num_bytes: int) -> None:
        self._room: WaitingRoom | None = room
        self._model = model
        self._num_bytes = num_bytes

    def begin(self) -> None:
        """The first token is here: wait no more. Once."""
        if self._room is not None:
            self._room._leave(self._model, self._num_bytes, began=True)
            self._room = None

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._room is not None:
            self._room._leave(self._model, self._num_bytes, began=False)
            self._room = None


class WaitingRoom:
    """Admits those who wait, and tells those it turns away when to come back.

    Args:
        bounds: in bytes; the number is each model's own.
        clock: monotonic seconds.
    """

    def __init__(self, bounds: Bounds | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._queues: dict[str, _Queue] = {}
        self._num_bytes = 0

    def num_waiting(self, model: str) -> int:
        """Return how many wait for a model."""
        queue = self._queues.get(model)
        return 0 if queue is None else queue.num_waiting

    def enter(self, model: str, num_bytes: int, max_waiting: int) -> Place:
        """Take a place for one request of `num_bytes`.

        Raises:
            Overloaded: `max_waiting` wait already, or too many bytes; says when to come back.
        """
        queue = self._queues.get(model)
        if queue is not None and queue.num_waiting >= max_waiting:
            raise self._refusal(model, queue, f"{queue.num_waiting} requests")
        if queue is not None and queue.num_bytes + num_bytes > self._bounds.max_model_bytes:
            raise self._refusal(model, queue, f"Requests of {size(queue.num_bytes)}")
        if self._num_bytes and self._num_bytes + num_bytes > self._bounds.max_bytes:
            raise Overloaded(
                f"Requests of {size(self._num_bytes)} already wait on this server. Try again later.",
                retry_after_s=max((self._left_s(queue) for queue in self._queues.values()), default=None),
            )
        if queue is None:
            queue = self._queues[model] = _Queue(busy_since=self._clock())
        queue.num_waiting += 1
        queue.num_bytes += num_bytes
        self._num_bytes += num_bytes
        return Place(self, model, num_bytes)

    def _refusal(self, model: str, queue: _Queue, who: str) -> Overloaded:
        left_s = self._left_s(queue)
        loading = ", which is being loaded" if queue.is_loading else ""
        return Overloaded(
            f"{who} already wait for the model '{model}'{loading}. Try again in about {duration(left_s)}.",
            retry_after_s=left_s,
        )

    def _leave(self, model: str, num_bytes: int, *, began: bool) -> None:
        queue = self._queues[model]
        queue.num_waiting -= 1
        queue.num_bytes -= num_bytes
        self._num_bytes -= num_bytes
        if not queue.num_waiting:
            del self._queues[model]
        elif began:
            if queue.is_loading:
                self.ready(model)
            queue.starts.append(self._clock())

    def loading(self, model: str, eta_ms: int | None = None) -> None:
        """Hear that a model that somebody waits for is coming up, in `eta_ms`; 0: nobody knows; None: nothing new."""
        if (queue := self._queues.get(model)) is not None:
            queue.is_loading = True
            if eta_ms is not None:
                queue.ready_at = self._clock() + eta_ms / 1000 if eta_ms else None

    def ready(self, model: str) -> None:
        """Hear that a model is up: from now on its queue moves."""
        if (queue := self._queues.get(model)) is not None and queue.is_loading:
            queue.is_loading, queue.ready_at = False, None
            queue.busy_since = self._clock()
            queue.starts.clear()

    def retry_after_s(self, model: str) -> float | None:
        """Return when about half of those who wait for a model will have begun; None if none waits here."""
        queue = self._queues.get(model)
        return None if queue is None else self._left_s(queue)

    def _left_s(self, queue: _Queue) -> float:
        now = self._clock()
        # Without better knowledge it takes as long again as it has taken.
        waited_s = now - queue.busy_since
        if queue.is_loading:
            left_s = max(UNKNOWN_LOAD_S, waited_s) if queue.ready_at is None else queue.ready_at - now
        elif not queue.starts:
            left_s = waited_s
        else:
            full = len(queue.starts) == _NUM_STARTS
            moving_s = now - (queue.starts[0] if full else queue.busy_since)
            left_s = queue.num_waiting / 2 * moving_s / len(queue.starts)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, left_s))

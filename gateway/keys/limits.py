"""How much each key may ask for, counted over all gateways of a server. Above: `doors`, `dispatch`; below: one file.

One file that every gateway maps holds a row for each limited key: when its requests and its tokens would be used up
(the generic cell rate algorithm's "theoretical arrival time", ITU-T I.371), and how many requests of it run in each
gateway. A lock on the file makes a change whole. A gateway has a seat, a column of the table, by a lock that the kernel
frees when it dies; what a dead one still had running is dropped as soon as it would keep anybody out.

Times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hostler.errors import HostlerError
from hostler.keys import Key

from gateway.errors import RateLimited

WINDOW_S = 60.0
MAX_DEBT_S = 10 * WINDOW_S
"""A reply may cost more tokens than its window had left. Longer than this nobody pays for one."""

_NUM_SEATS = 128
_NUM_ROWS = 2048
_HEAD = struct.Struct("=Qdd")  # key id, requests used up until, tokens used up until
_COUNT = struct.Struct("=H")
_ROW_BYTES = _HEAD.size + _NUM_SEATS * _COUNT.size
# A gateway that is frozen while it holds the lock must not freeze the others: they go on after so long, less exactly.
_LOCK_PATIENCE_S = 0.01


class KeyLimits:
    """The limits of all keys, as this gateway keeps them. For the event loop's thread only.

    Args:
        directory: that all gateways of a server share; None: one of its own.
        clock: seconds, the same in every gateway.
    """

    def __init__(self, directory: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = None if directory else tempfile.TemporaryDirectory(prefix="hostler-limits-")
        self._directory = directory if directory is not None else Path(self._own.name if self._own else "")
        self._clock = clock
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._file = os.open(self._directory / "table", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, _NUM_ROWS * _ROW_BYTES)
        self._table = mmap.mmap(self._file, _NUM_ROWS * _ROW_BYTES)
        self._seat, self._seat_file = self._take_seat()

    def close(self) -> None:
        """Leave; the seat is free for another gateway."""
        self._table.close()
        os.close(self._file)
        os.close(self._seat_file)
        if self._own is not None:
            self._own.cleanup()

    def enter(self, key: Key) -> dict[str, str]:
        """Admit one request of a key, or refuse it; `leave` must follow once it is over. Returns the reply's headers.

        Raises:
            RateLimited: with the headers, and when to come back.
        """
        with self._locked():
            row = self._row(key.id)
            now_s = self._clock()
            requests_until, tokens_until = self._untils(row, now_s)
            headers = _headers(key, requests_until - now_s, tokens_until - now_s)
            if (rate := key.requests_per_minute) is not None:
                wait_s = requests_until - now_s + WINDOW_S / rate - WINDOW_S
                if wait_s > 1e-9:
                    raise _refusal(f"This API key may make {rate} requests per minute.", wait_s, headers)
            if (rate := key.tokens_per_minute) is not None:
                wait_s = tokens_until - now_s - WINDOW_S + WINDOW_S / rate
                if wait_s > 1e-9:
                    raise _refusal(f"This API key may use {rate} tokens per minute.", wait_s, headers)
            if key.max_streams is not None and self._num_running(row) >= key.max_streams:
                self._drop_the_dead()
                if self._num_running(row) >= key.max_streams:
                    raise _refusal(f"This API key may have {key.max_streams} requests at a time.", 1.0, headers)
            if key.requests_per_minute is not None:
                requests_until += WINDOW_S / key.requests_per_minute
            _HEAD.pack_into(self._table, row, int(key.id, 16), requests_until, tokens_until)
            self._count(row, 1)
        return _headers(key, requests_until - now_s, tokens_until - now_s)

    def leave(self, key: Key) -> None:
        """A request that `enter` admitted is over."""
        with self._locked():
            self._count(self._row(key.id), -1)

    def charge(self, key: Key, num_tokens: int) -> None:
        """Take tokens off a key's window, perhaps more than it has left."""
        if key.tokens_per_minute is None or num_tokens <= 0:
            return
        with self._locked():
            row = self._row(key.id)
            now_s = self._clock()
            requests_until, tokens_until = self._untils(row, now_s)
            tokens_until = min(tokens_until + num_tokens * WINDOW_S / key.tokens_per_minute, now_s + MAX_DEBT_S)
            _HEAD.pack_into(self._table, row, int(key.id, 16), requests_until, tokens_until)

    def _untils(self, row: int, now_s: float) -> tuple[float, float]:
        _, requests_until, tokens_until = _HEAD.unpack_from(self._table, row)
        # Nothing later than the longest debt can be true: the table is older than the machine's last start.
        latest_s = now_s + MAX_DEBT_S
        requests_until = max(now_s, requests_until) if requests_until <= latest_s else now_s
        return requests_until, max(now_s, tokens_until) if tokens_until <= latest_s else now_s

    def _row(self, key_id: str) -> int:
        """Return where a key's row begins: the first free one after its place, and in a full table that place."""
        number = int(key_id, 16)
        for step in range(_NUM_ROWS):
            row = (number + step) % _NUM_ROWS * _ROW_BYTES
            found = _HEAD.unpack_from(self._table, row)[0]
            if found == number:
                return row
            if found == 0:
                _HEAD.pack_into(self._table, row, number, 0.0, 0.0)
                return row
        # Keys that were revoked since the server started fill it: the row begins anew.
        row = number % _NUM_ROWS * _ROW_BYTES
        self._table[row : row + _ROW_BYTES] = bytes(_ROW_BYTES)
        _HEAD.pack_into(self._table, row, number, 0.0, 0.0)
        return row

    def _num_running(self, row: int) -> int:
        return sum(struct.unpack_from(f"={_NUM_SEATS}H", self._table, row + _HEAD.size))

    def _count(self, row: int, step: int) -> None:
        place = row + _HEAD.size + self._seat * _COUNT.size
        count = _COUNT.unpack_from(self._table, place)[0] + step
        _COUNT.pack_into(self._table, place, min(max(count, 0), 0xFFFF))

    def _take_seat(self) -> tuple[int, int]:
        for seat in range(_NUM_SEATS):
            if (file := self._open_seat(seat)) is not None:
                with self._locked():
                    self._clear(seat)
                return seat, file
        raise OSError(f"{_NUM_SEATS} gateways already share {self._directory}")

    def _open_seat(self, seat: int) -> int | None:
        """Return the seat's file, locked; None if a living gateway has it."""
        file = os.open(self._directory / f"seat-{seat}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        return file

    def _drop_the_dead(self) -> None:
        """Clear what gateways that have died had running."""
        for path in self._directory.glob("seat-*"):
            seat = int(path.name.removeprefix("seat-"))
            if seat != self._seat and (file := self._open_seat(seat)) is not None:
                self._clear(seat)
                os.close(file)

    def _clear(self, seat: int) -> None:
        for row in range(0, _NUM_ROWS * _ROW_BYTES, _ROW_BYTES):
            if _HEAD.unpack_from(self._table, row)[0]:
                _COUNT.pack_into(self._table, row + _HEAD.size + seat * _COUNT.size, 0)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        held = False
        while not held:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    break
        try:
            yield
        finally:
            if held:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def _headers(key: Key, requests_used_s: float, tokens_used_s: float) -> dict[str, str]:
    """Return OpenAI's headers; `…_used_s`: how long the window's used part takes to come back, in seconds."""
    headers: dict[str, str] = {}
    for what, rate, used_s in (
        ("requests", key.requests_per_minute, requests_used_s),
        ("tokens", key.tokens_per_minute, tokens_used_s),
    ):
        if rate is not None:
            headers[f"x-ratelimit-limit-{what}"] = str(rate)
            remaining = math.floor((WINDOW_S - used_s) * rate / WINDOW_S + 1e-6)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(0, remaining))
            headers[f"x-ratelimit-reset-{what}"] = f"{max(0.0, used_s):.3f}s"
    return headers


def _refusal(message: str, wait_s: float, headers: dict[str, str]) -> HostlerError:
    return RateLimited(f"{message} Try again in {max(1, math.ceil(wait_s))} s.", wait_s, headers)

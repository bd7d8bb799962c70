"""Records and their items: the pieces of the store's statements. Above: `conversations`, `database`; below: `schema`.

For one thread. Every read names the owner: what another key made does not exist. Whatever changes several rows is one
transaction.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.responses.errors import NotStored, TooLargeToStore

Item = dict[str, Any]

IS_LIVE = "status IN ('queued', 'in_progress')"
ITEM_OVERHEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What the store may hold. Whatever was not used for longest goes first.

    Attributes:
        max_records: responses and conversations; 0 stores nothing.
        max_bytes: of all of them, as JSON.
        max_age_s: after its last use.
    """

    max_records: int
    max_bytes: int
    max_age_s: float


class Rows:
    """What responses and conversations have in common. `clock` tells Unix seconds."""

    def __init__(self, connection: sqlite3.Connection, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._connection = connection
        self._limits = limits
        self._clock = clock

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Hold one write transaction."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold one view of the database, whatever others write meanwhile."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("COMMIT")

    def items(self, record_id: str, is_output: bool | None = None) -> list[Item]:
        """Return the items of a record in order; of both kinds, or only input or output. Checks no owner."""
        rows = self._connection.execute(
            "SELECT body FROM items WHERE record = ? AND (? IS NULL OR is_output = ?) ORDER BY place",
            (record_id, is_output, is_output),
        )
        return [orjson.loads(row[0]) for row in rows]

    def find_items(self, owner: str, ids: Iterable[str]) -> dict[str, Item]:
        """Return the items of these ids that the owner has."""
        found = {}
        for item_id in ids:
            row = self._connection.execute(
                "SELECT items.body FROM items JOIN records ON records.id = record WHERE items.id = ? AND owner = ?"
                " ORDER BY items.rowid DESC LIMIT 1",
                (item_id, owner),
            ).fetchone()
            if row is not None:
                found[item_id] = orjson.loads(row[0])
        return found

    def totals(self) -> tuple[int, int]:
        """Return how many records there are, and their bytes."""
        num_records, num_bytes = self._connection.execute("SELECT num_records, num_bytes FROM totals").fetchone()
        return num_records, num_bytes

    def _oldest(self) -> float:
        return self._clock() - self._limits.max_age_s

    def _record(self, owner: str, record_id: str, kind: str) -> tuple[dict[str, Any], str, str | None]:
        row = self._connection.execute(
            "SELECT body, status, runner FROM records WHERE id = ? AND owner = ? AND kind = ? AND used_unix_s >= ?",
            (record_id, owner, kind, self._oldest()),
        ).fetchone()
        if row is None:
            raise NotStored(kind, record_id)
        return orjson.loads(row[0]), row[1], row[2]

    def _insert_record(
        self,
        record_id: str,
        kind: str,
        owner: str,
        body: dict[str, Any],
        *,
        status: str,
        runner: str | None = None,
        previous: str | None = None,
        conversation: str | None = None,
    ) -> None:
        now, text = self._clock(), orjson.dumps(body)
        self._connection.execute(
            "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (record_id, kind, owner, now, now, len(text), status, runner, previous, conversation, text),
        )

    def _append_items(self, record_id: str, items: Sequence[Item], *, is_output: bool) -> None:
        if not items:
            return
        (place,) = self._connection.execute(
            "SELECT coalesce(max(place) + 1, 0) FROM items WHERE record = ?", (record_id,)
        ).fetchone()
        texts = [orjson.dumps(item) for item in items]
        self._connection.executemany(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
            [
                (record_id, place + i, item["id"], is_output, text)
                for i, (item, text) in enumerate(zip(items, texts, strict=True))
            ],
        )
        num_bytes = sum(len(text) + ITEM_OVERHEAD_BYTES for text in texts)
        self._connection.execute("UPDATE records SET num_bytes = num_bytes + ? WHERE id = ?", (num_bytes, record_id))
        (total,) = self._connection.execute("SELECT num_bytes FROM records WHERE id = ?", (record_id,)).fetchone()
        if total > self._limits.max_bytes:
            raise TooLargeToStore

    def _append_frames(self, record_id: str, frames: Iterable[tuple[int, bytes]]) -> None:
        self._connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?)", [(record_id, number, frame) for number, frame in frames]
        )

    def _evict(self, connection: sqlite3.Connection) -> None:
        """Delete what is too old, then the least recently used until the rest is within bounds; nothing that runs."""
        connection.execute("DELETE FROM records WHERE used_unix_s < ?", (self._oldest(),))
        while True:
            num_records, num_bytes = self.totals()
            if num_records <= self._limits.max_records and num_bytes <= self._limits.max_bytes:
                return
            done = connection.execute(
                f"DELETE FROM records WHERE id = (SELECT id FROM records WHERE NOT {IS_LIVE}"
                " ORDER BY used_unix_s LIMIT 1)"
            )
            if not done.rowcount:
                return

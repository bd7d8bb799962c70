"""The store's reads and writes, as plain blocking functions. Above: `store`; below: `conversations`, `rows`.

For one thread. Whoever ends a response first has ended it: later writes of its runner find nothing to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.responses.conversations import Conversations
from gateway.responses.errors import HistoryGone, HistoryTooLong, NotStored, StillRunning
from gateway.responses.rows import IS_LIVE, Item

MakeEnding = Callable[[dict[str, Any], int], tuple[dict[str, Any], bytes]]
"""From an object and a sequence number to the ended object and the frame that says so."""

MAX_HISTORY_BYTES = 16 * 1024 * 1024
MAX_TURNS = 4096
_LIVE = ("queued", "in_progress")
_CONTINUABLE = ("completed", "incomplete")


def is_live(status: str) -> bool:
    """Return whether a response of this status has not ended."""
    return status in _LIVE


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as it lies in the store: the object with its output, and which process works on it, if any does."""

    body: dict[str, Any]
    status: str
    runner: str | None

    @property
    def is_live(self) -> bool:
        """Whether it has not ended."""
        return is_live(self.status)


class Database(Conversations):
    """All statements."""

    def insert(self, owner: str, response: dict[str, Any], inputs: Sequence[Item], runner: str | None = None) -> None:
        """Add a response, finished or (with `runner`) to be worked on. A finished one extends its conversation.

        Raises:
            TooLargeToStore: it alone is more than the store may hold.
        """
        output: list[Item] = response["output"]
        conversation = (response["conversation"] or {}).get("id")
        with self.writing() as connection:
            self._insert_record(
                response["id"],
                "response",
                owner,
                _without_output(response),
                status=response["status"],
                runner=runner,
                previous=response["previous_response_id"],
                conversation=conversation,
            )
            self._append_items(response["id"], inputs, is_output=False)
            self._append_items(response["id"], output, is_output=True)
            if conversation and runner is None:
                self._extend_if_there(owner, conversation, [*inputs, *output])
            self._evict(connection)

    def get(self, owner: str, response_id: str) -> Stored:
        """Return a response.

        Raises:
            NotStored: there is none of that id, or it is another's.
        """
        with self.reading():
            body, status, runner = self._record(owner, response_id, "response")
            output = self.items(response_id, is_output=True)
        return Stored({**body, "output": output}, status, runner)

    def state(self, owner: str, response_id: str) -> tuple[str, str | None]:
        """Return a response's status and runner, without reading all of it.

        Raises:
            NotStored: there is none.
        """
        row = self._connection.execute(
            "SELECT status, runner FROM records WHERE id = ? AND owner = ? AND kind = 'response'", (response_id, owner)
        ).fetchone()
        if row is None:
            raise NotStored("response", response_id)
        return row[0], row[1]

    def inputs(self, owner: str, response_id: str) -> list[Item]:
        """Return a response's own input items, oldest first."""
        self._record(owner, response_id, "response")
        return self.items(response_id, is_output=False)

    def delete(self, owner: str, record_id: str, kind: str) -> None:
        """Forget a response or conversation and all that it holds. A running one stops by itself.

        Raises:
            NotStored: there is none.
        """
        with self.writing() as connection:
            done = connection.execute(
                "DELETE FROM records WHERE id = ? AND owner = ? AND kind = ?", (record_id, owner, kind)
            )
        if not done.rowcount:
            raise NotStored(kind, record_id)

    def append(
        self, response_id: str, frames: Iterable[tuple[int, bytes]], status: str, body: dict[str, Any] | None = None
    ) -> bool:
        """Add events of a running response; False when it has been ended or deleted by another."""
        frames = list(frames)
        num_bytes = sum(len(frame) for _, frame in frames)
        with self.writing() as connection:
            done = connection.execute(
                "UPDATE records SET status = ?, num_bytes = num_bytes + ?, body = coalesce(?, body)"
                f" WHERE id = ? AND {IS_LIVE}",
                (status, num_bytes, orjson.dumps(_without_output(body)) if body else None, response_id),
            )
            if not done.rowcount:
                return False
            self._append_frames(response_id, frames)
        return True

    def still_runs(self, response_id: str) -> bool:
        """Return whether nobody has ended or deleted a response."""
        sought = f"SELECT 1 FROM records WHERE id = ? AND {IS_LIVE}"
        return self._connection.execute(sought, (response_id,)).fetchone() is not None

    def finish(self, owner: str, response: dict[str, Any], frames: Iterable[tuple[int, bytes]]) -> bool:
        """End a running response; False when another was first.

        Raises:
            TooLargeToStore: with its output it is more than the store may hold; it still runs.
        """
        response_id, output = response["id"], response["output"]
        frames = list(frames)
        with self.writing() as connection:
            done = connection.execute(
                "UPDATE records SET status = ?, runner = NULL, body = ?, used_unix_s = ?, num_bytes = num_bytes + ?"
                f" WHERE id = ? AND {IS_LIVE}",
                (
                    response["status"],
                    orjson.dumps(_without_output(response)),
                    self._clock(),
                    sum(len(frame) for _, frame in frames),
                    response_id,
                ),
            )
            if not done.rowcount:
                return False
            self._append_frames(response_id, frames)
            self._append_items(response_id, output, is_output=True)
            conversation = (response["conversation"] or {}).get("id")
            if conversation and response["status"] in _CONTINUABLE:
                self._extend_if_there(owner, conversation, [*self.items(response_id, is_output=False), *output])
            self._evict(connection)
        return True

    def end(self, owner: str, response_id: str, make_ending: MakeEnding) -> Stored:
        """End a response from outside, unless it has ended; return it as it then is.

        Raises:
            NotStored: there is none.
        """
        with self.writing() as connection:
            body, status, _ = self._record(owner, response_id, "response")
            if status in _LIVE:
                last = connection.execute("SELECT max(number) FROM events WHERE record = ?", (response_id,)).fetchone()
                number = -1 if last[0] is None else last[0]
                ended, frame = make_ending({**body, "output": []}, number + 1)
                connection.execute(
                    "UPDATE records SET status = ?, runner = NULL, body = ?, num_bytes = num_bytes + ? WHERE id = ?",
                    (ended["status"], orjson.dumps(_without_output(ended)), len(frame), response_id),
                )
                self._append_frames(response_id, [(number + 1, frame)])
        return self.get(owner, response_id)

    def events_after(self, owner: str, response_id: str, number: int, max_events: int) -> list[tuple[int, bytes]]:
        """Return frames of a response with higher numbers than `number`, in order."""
        rows = self._connection.execute(
            "SELECT number, frame FROM events JOIN records ON records.id = record"
            " WHERE record = ? AND owner = ? AND number > ? ORDER BY number LIMIT ?",
            (response_id, owner, number, max_events),
        )
        return [(row[0], row[1]) for row in rows]

    def history(self, owner: str, response_id: str) -> list[Item]:
        """Return all items of a response and of those it continues, oldest first; all of them count as used now.

        Raises:
            HistoryGone: it, or one before it, is not (or no longer) stored.
            StillRunning: it has not ended well.
            HistoryTooLong: more than can be sent to a model at once.
        """
        chain: list[str] = []
        num_bytes = 0
        link: str | None = response_id
        while link is not None:
            row = self._connection.execute(
                "SELECT previous, status, num_bytes, conversation FROM records WHERE id = ? AND owner = ?"
                " AND kind = 'response' AND used_unix_s >= ?",
                (link, owner, self._oldest()),
            ).fetchone()
            if row is None:
                raise HistoryGone(response_id, link)
            if row[1] not in _CONTINUABLE:
                raise StillRunning(response_id, link, row[1])
            if row[3] is not None:
                raise HistoryGone(response_id, link, conversation=row[3])
            chain.append(link)
            num_bytes += row[2]
            if num_bytes > MAX_HISTORY_BYTES or len(chain) > MAX_TURNS:
                raise HistoryTooLong(response_id)
            link = row[0]
        with self.writing() as connection:
            now = self._clock()
            connection.executemany("UPDATE records SET used_unix_s = ? WHERE id = ?", [(now, each) for each in chain])
        return [item for link in reversed(chain) for item in self.items(link)]


def _without_output(response: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in response.items() if key != "output"}

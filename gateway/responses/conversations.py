"""Conversations: lists of items that outlive responses. Above: `database`; below: `rows`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import orjson

from gateway.responses.errors import NotStored
from gateway.responses.rows import ITEM_OVERHEAD_BYTES, Item, Rows


class Conversations(Rows):
    """The statements of conversations."""

    def insert_conversation(self, owner: str, conversation: dict[str, Any], items: Sequence[Item]) -> None:
        """Add a conversation.

        Raises:
            TooLargeToStore: it alone is more than the store may hold.
        """
        with self.writing() as connection:
            self._insert_record(conversation["id"], "conversation", owner, conversation, status="completed")
            self._append_items(conversation["id"], items, is_output=False)
            self._evict(connection)

    def conversation(self, owner: str, conversation_id: str) -> dict[str, Any]:
        """Return a conversation, which counts as used now.

        Raises:
            NotStored: there is none.
        """
        body, _, _ = self._record(owner, conversation_id, "conversation")
        with self.writing() as connection:
            connection.execute("UPDATE records SET used_unix_s = ? WHERE id = ?", (self._clock(), conversation_id))
        return body

    def conversation_items(self, owner: str, conversation_id: str) -> list[Item]:
        """Return its items, oldest first."""
        self.conversation(owner, conversation_id)
        return self.items(conversation_id)

    def update_conversation(self, owner: str, conversation: dict[str, Any]) -> None:
        """Replace a conversation's object."""
        self._record(owner, conversation["id"], "conversation")
        text = orjson.dumps(conversation)
        with self.writing() as connection:
            connection.execute(
                "UPDATE records SET num_bytes = num_bytes + ? - length(body), body = ? WHERE id = ? AND owner = ?",
                (len(text), text, conversation["id"], owner),
            )

    def extend_conversation(self, owner: str, conversation_id: str, items: Sequence[Item]) -> None:
        """Add items at a conversation's end."""
        with self.writing() as connection:
            self._extend(owner, conversation_id, items)
            self._evict(connection)

    def delete_conversation_item(self, owner: str, conversation_id: str, item_id: str) -> None:
        """Take one item out of a conversation.

        Raises:
            NotStored: there is no such conversation, or no such item in it.
        """
        self._record(owner, conversation_id, "conversation")
        with self.writing() as connection:
            gone = connection.execute(
                "DELETE FROM items WHERE record = ? AND id = ? RETURNING length(body)", (conversation_id, item_id)
            ).fetchall()
            connection.execute(
                "UPDATE records SET num_bytes = num_bytes - ? WHERE id = ?",
                (sum(length + ITEM_OVERHEAD_BYTES for (length,) in gone), conversation_id),
            )
        if not gone:
            raise NotStored("item", item_id)

    def _extend(self, owner: str, conversation_id: str, items: Sequence[Item]) -> None:
        self._record(owner, conversation_id, "conversation")
        self._append_items(conversation_id, items, is_output=False)
        self._connection.execute("UPDATE records SET used_unix_s = ? WHERE id = ?", (self._clock(), conversation_id))

    def _extend_if_there(self, owner: str, conversation_id: str, items: Sequence[Item]) -> None:
        """Extend a conversation; one that was deleted meanwhile takes nothing along."""
        with suppress(NotStored):
            self._extend(owner, conversation_id, items)

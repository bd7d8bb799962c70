"""The store's database: its tables, and how it is opened. Above: `database`.

One SQLite file, shared by all gateway processes of a server; each has one connection, used by one thread. `records` are
responses and conversations, `items` what they hold in order, `events` the frames of background responses. `totals` is
kept by triggers, so that bounds cost no counting.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUSY_TIMEOUT_S = 5.0
_VERSION = 1

_TABLES = """
CREATE TABLE records (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,            -- response, conversation
    owner TEXT NOT NULL,           -- cache scope of the key that made it
    created_unix_s REAL NOT NULL,
    used_unix_s REAL NOT NULL,
    num_bytes INTEGER NOT NULL,
    status TEXT NOT NULL,
    runner TEXT,                   -- gateway process that works on it
    previous TEXT,                 -- response that it continues
    conversation TEXT,
    body BLOB NOT NULL             -- the object as JSON; a response's without its output
);
CREATE INDEX records_by_use ON records (used_unix_s);
CREATE TABLE items (
    record TEXT NOT NULL REFERENCES records (id) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    id TEXT NOT NULL,
    is_output INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE UNIQUE INDEX items_by_place ON items (record, place);
CREATE INDEX items_by_id ON items (id);
CREATE TABLE events (
    record TEXT NOT NULL REFERENCES records (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    frame BLOB NOT NULL,
    PRIMARY KEY (record, number)
) WITHOUT ROWID;
CREATE TABLE totals (num_records INTEGER NOT NULL, num_bytes INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0);
CREATE TRIGGER records_come AFTER INSERT ON records BEGIN
    UPDATE totals SET num_records = num_records + 1, num_bytes = num_bytes + NEW.num_bytes;
END;
CREATE TRIGGER records_go AFTER DELETE ON records BEGIN
    UPDATE totals SET num_records = num_records - 1, num_bytes = num_bytes - OLD.num_bytes;
END;
CREATE TRIGGER records_grow AFTER UPDATE OF num_bytes ON records BEGIN
    UPDATE totals SET num_bytes = num_bytes + NEW.num_bytes - OLD.num_bytes;
END;
"""


def open_database(path: Path) -> sqlite3.Connection:
    """Open the file, or make it, for this user alone. The connection begins no transactions by itself.

    Raises:
        OSError, sqlite3.Error: it cannot be opened.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(path):
        return _open(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from opening meanwhile: SQLite does not wait where a file changes to write-ahead logging."""
    descriptor = os.open(path.with_name(f"{path.name}.opening"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> sqlite3.Connection:
    # SQLite gives its journal files the mode of the database.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # What a crash of the whole machine may lose is the last moments; a crash of ours loses nothing.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        # What is deleted is gone from the file, too.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA journal_size_limit = 16777216")
        _create(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _create(connection: sqlite3.Connection) -> None:
    if _version(connection) == _VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection)
        if version == 0:
            for statement in _statements(_TABLES):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise sqlite3.DatabaseError(f"stored responses are of version {version}; this hostler knows {_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _statements(script: str) -> list[str]:
    statements, pending = [], ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            statements.append(pending)
            pending = ""
    return statements

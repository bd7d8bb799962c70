"""The store of responses: what it keeps, for whom and for how long. Our own rules, with a clock of the test's."""

from __future__ import annotations

import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostler.inference.v1 import inference_pb2 as pb

from gateway.responses.database import MAX_TURNS, Database
from gateway.responses.errors import HistoryGone, HistoryTooLong, NotStored, StillRunning, TooLargeToStore
from gateway.responses.rows import Limits
from gateway.responses.runners import Runner
from gateway.responses.schema import open_database
from gateway.responses.truncation import cut_points, reserve_tokens, surely_fits

ME, OTHER = "me", "other"
LARGE = Limits(max_records=100, max_bytes=10**6, max_age_s=1000)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1  # no two uses at one time
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path, clock: Clock) -> Iterator[Database]:
    database = Database(open_database(tmp_path / "r.db"), LARGE, clock)
    yield database
    database.close()


def with_limits(tmp_path: Path, clock: Clock, **limits: float) -> Database:
    kept: dict[str, Any] = {"max_records": 100, "max_bytes": 10**6, "max_age_s": 1000} | limits
    return Database(open_database(tmp_path / "r.db"), Limits(**kept), clock)


def message(identity: str, text: str = "x") -> dict[str, Any]:
    return {"id": identity, "type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def response(identity: str, previous: str | None = None, status: str = "completed", **fields: Any) -> dict[str, Any]:
    output = [message(f"out_{identity}")] if status == "completed" else []
    return {
        "id": identity,
        "status": status,
        "previous_response_id": previous,
        "conversation": None,
        "output": output,
        **fields,
    }


def ending(body: dict[str, Any], number: int) -> tuple[dict[str, Any], bytes]:
    return {**body, "status": "cancelled"}, f"frame {number}".encode()


def exists(database: Database, identity: str) -> bool:
    try:
        database.get(ME, identity)
    except NotStored:
        return False
    return True


def test_the_file_and_its_journals_are_this_users_alone(tmp_path: Path, clock: Clock) -> None:
    database = with_limits(tmp_path / "made", clock)
    database.insert(ME, response("r"), [message("i")])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").iterdir()}
    assert modes == dict.fromkeys(("r.db", "r.db-wal", "r.db-shm", "r.db.opening"), 0o600)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700
    database.close()


def test_a_file_of_another_version_is_left_alone(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "r.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(sqlite3.DatabaseError, match="version 99"):
        open_database(tmp_path / "r.db")


def test_everything_is_bound_to_its_owner(database: Database) -> None:
    database.insert(ME, response("r"), [message("i")])
    database.insert_conversation(ME, {"id": "c"}, [message("ci")])
    for read in (
        lambda: database.get(OTHER, "r"),
        lambda: database.state(OTHER, "r"),
        lambda: database.inputs(OTHER, "r"),
        lambda: database.delete(OTHER, "r", "response"),
        lambda: database.end(OTHER, "r", ending),
        lambda: database.conversation_items(OTHER, "c"),
        lambda: database.extend_conversation(OTHER, "c", [message("z")]),
        lambda: database.delete_conversation_item(OTHER, "c", "ci"),
        lambda: database.update_conversation(OTHER, {"id": "c"}),
    ):
        with pytest.raises(NotStored):
            read()
    with pytest.raises(HistoryGone):
        database.history(OTHER, "r")
    assert database.find_items(OTHER, ["i", "ci", "out_r"]) == {}
    assert database.events_after(OTHER, "r", -1, 10) == []
    assert set(database.find_items(ME, ["i", "ci", "out_r", "no"])) == {"i", "ci", "out_r"}
    # A response is no conversation, and the other way round.
    with pytest.raises(NotStored):
        database.conversation(ME, "r")
    with pytest.raises(NotStored):
        database.delete(ME, "c", "response")


def test_history_is_all_turns_oldest_first(database: Database) -> None:
    database.insert(ME, response("a"), [message("a1"), message("a2")])
    database.insert(ME, response("b", "a"), [message("b1")])
    database.insert(ME, response("c", "b", status="incomplete"), [message("c1")])
    assert [item["id"] for item in database.history(ME, "c")] == ["a1", "a2", "out_a", "b1", "out_b", "c1"]


def test_a_history_with_a_hole_is_refused_and_not_shortened(database: Database) -> None:
    database.insert(ME, response("a"), [message("a1")])
    database.insert(ME, response("b", "a"), [message("b1")])
    database.delete(ME, "a", "response")
    with pytest.raises(HistoryGone, match="no longer stored"):
        database.history(ME, "b")


def test_only_an_answered_response_is_continued(database: Database) -> None:
    database.insert(ME, response("q", status="queued"), [], runner="run")
    with pytest.raises(StillRunning):
        database.history(ME, "q")
    database.end(ME, "q", ending)
    with pytest.raises(StillRunning):
        database.history(ME, "q")


def test_a_history_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    database.insert(ME, response("a"), [message("a1", "x" * 600)])
    database.insert(ME, response("b", "a"), [message("b1", "x" * 600)])
    assert len(database.history(ME, "b")) == 4
    monkeypatch.setattr("gateway.responses.database.MAX_HISTORY_BYTES", 1000)
    with pytest.raises(HistoryTooLong):
        database.history(ME, "b")
    assert MAX_TURNS > 1000


def test_the_number_is_bounded_and_the_least_recently_used_goes_first(tmp_path: Path, clock: Clock) -> None:
    database = with_limits(tmp_path, clock, max_records=3)
    for name in "abc":
        database.insert(ME, response(name), [message(f"{name}1")])
    database.history(ME, "a")
    database.insert(ME, response("d"), [])
    assert [name for name in "abcd" if exists(database, name)] == ["a", "c", "d"]
    assert database.totals()[0] == 3
    database.insert_conversation(OTHER, {"id": "e"}, [])
    assert [name for name in "abcd" if exists(database, name)] == ["a", "d"]
    database.close()


def test_the_bytes_are_bounded_and_counted_without_drift(tmp_path: Path, clock: Clock) -> None:
    database = with_limits(tmp_path, clock, max_bytes=5000)
    for number in range(20):
        database.insert(ME, response(f"r{number}"), [message(f"i{number}", "x" * 900)])
        assert database.totals()[1] <= 5000
    assert exists(database, "r19")
    assert not exists(database, "r0")
    database.insert_conversation(ME, {"id": "c", "metadata": {}}, [message("c1")])
    database.update_conversation(ME, {"id": "c", "metadata": {"a": "b" * 100}})
    database.extend_conversation(ME, "c", [message("c2")])
    database.delete_conversation_item(ME, "c", "c1")
    database.delete_conversation_item(ME, "c", "c2")
    database.delete(ME, "c", "conversation")
    for number in range(20):
        if exists(database, f"r{number}"):
            database.delete(ME, f"r{number}", "response")
    assert database.totals() == (0, 0)
    database.close()


def test_what_is_larger_than_the_whole_store_leaves_the_rest_alone(tmp_path: Path, clock: Clock) -> None:
    database = with_limits(tmp_path, clock, max_bytes=5000)
    database.insert(ME, response("small"), [])
    with pytest.raises(TooLargeToStore):
        database.insert(ME, response("big"), [message("i", "x" * 6000)])
    assert exists(database, "small")
    assert not exists(database, "big")
    database.close()


def test_what_was_not_used_for_too_long_is_gone_before_it_is_deleted(database: Database, clock: Clock) -> None:
    database.insert(ME, response("a"), [message("a1")])
    clock.now += 900
    assert exists(database, "a")
    clock.now += 200
    assert not exists(database, "a")
    assert database.totals()[0] == 1
    database.insert(ME, response("b"), [])
    assert database.totals()[0] == 1


def test_whoever_ends_a_response_first_has_ended_it(database: Database) -> None:
    body = response("r", status="queued")
    database.insert(ME, body, [message("i")], runner="run")
    assert database.append("r", [(0, b"zero"), (1, b"one")], "in_progress", {**body, "status": "in_progress"})
    assert database.still_runs("r")
    ended = database.end(ME, "r", ending)
    assert (ended.status, ended.is_live, ended.runner) == ("cancelled", False, None)
    assert not database.still_runs("r")
    assert not database.append("r", [(2, b"late")], "in_progress")
    assert not database.finish(ME, response("r"), [(2, b"late")])
    assert database.get(ME, "r").body["output"] == []
    assert database.events_after(ME, "r", 0, 10) == [(1, b"one"), (2, b"frame 2")]
    assert database.end(ME, "r", ending) == ended


def test_what_runs_is_never_evicted(tmp_path: Path, clock: Clock) -> None:
    database = with_limits(tmp_path, clock, max_records=2)
    for name in "abc":
        database.insert(ME, response(name, status="queued"), [], runner="run")
    assert all(exists(database, name) for name in "abc")
    assert database.finish(ME, response("a"), [])
    assert not exists(database, "a")
    database.close()


def test_deleted_text_does_not_stay_in_the_file(tmp_path: Path, clock: Clock) -> None:
    database = with_limits(tmp_path, clock)
    database.insert(ME, response("a"), [message("a1", "a very secret word")])
    database.delete(ME, "a", "response")
    database._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    assert b"very secret" not in (tmp_path / "r.db").read_bytes()


def test_two_processes_write_at_once_and_lose_nothing(tmp_path: Path) -> None:
    def write(name: str) -> None:
        both.wait()
        database = Database(open_database(tmp_path / "r.db"), LARGE)
        for number in range(20):
            database.insert(name, response(f"{name}{number}"), [message("i")])
        database.close()

    both = threading.Barrier(2)
    threads = [threading.Thread(target=write, args=(name,)) for name in (ME, OTHER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database = Database(open_database(tmp_path / "r.db"), LARGE)
    assert database.totals()[0] == 40
    database.close()


def test_a_process_lives_as_long_as_its_lock(tmp_path: Path) -> None:
    mine, other = Runner(tmp_path / "r.db"), Runner(tmp_path / "r.db")
    assert mine.lives(mine.name)
    assert mine.lives(other.name)
    assert not mine.lives("nobody")
    other.close()
    assert not mine.lives(other.name)
    assert other.lives(mine.name)
    mine.close()
    assert list(tmp_path.iterdir()) == []


def test_a_process_finds_and_removes_what_dead_ones_left(tmp_path: Path) -> None:
    (tmp_path / "r.db.runner-dead").touch()
    living = Runner(tmp_path / "r.db")
    assert [path.name for path in tmp_path.iterdir()] == [f"r.db.runner-{living.name}"]
    living.close()


def test_what_surely_fits_is_known_without_counting() -> None:
    chat = pb.Chat(messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="x" * 1000)])])
    assert surely_fits(chat, 100, 2000)
    assert not surely_fits(chat, 1000, 2000)
    assert not surely_fits(chat, 100, 0)
    chat.messages[0].parts.append(pb.Part(image=pb.Media(data=b"x")))
    assert not surely_fits(chat, 100, 2000)


def test_a_conversation_is_cut_before_a_users_message_and_keeps_its_instructions() -> None:
    roles = (pb.ROLE_SYSTEM, pb.ROLE_USER, pb.ROLE_ASSISTANT, pb.ROLE_TOOL, pb.ROLE_ASSISTANT, pb.ROLE_USER)
    assert cut_points([pb.Message(role=role) for role in roles]) == (1, [1, 5])
    assert cut_points([pb.Message(role=pb.ROLE_USER)]) == (0, [0])
    assert reserve_tokens(None, 8192) == 1024
    assert reserve_tokens(100, 8192) == 100
    assert reserve_tokens(10**6, 8192) == 4096
    assert reserve_tokens(1, 8192) == 16

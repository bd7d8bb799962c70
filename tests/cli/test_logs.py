"""`hostler logs`: reading both forms of lines, merging files by time, following them, and keeping them small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostler import rundir
from hostler.rundir import RunDir
from typer.testing import Result

from cli import log_files, log_lines

Hostler = Callable[..., Result]

GATEWAY = """\
2026-11-01 10:00:01,000 INFO gateway.doors request request_id='req_1' method='POST' path='/v1/x' status=200
2026-11-01 10:00:03,500 WARNING gateway.dispatch a try failed request_id='req_2' reason='unavailable'
Traceback (most recent call last):
  File "x.py", line 1, in <module>
2026-11-01 10:00:05,000 ERROR gateway.errors unexpected exception request_id='req_12'
"""
ORCHESTRATOR = """\
{"time": "2026-11-01 10:00:02,000", "level": "INFO", "logger": "orchestrator", "message": "serving", "devices": ["cpu"]}
{"time": "2026-11-01 10:00:04,000", "level": "ERROR", "logger": "o", "message": "x", "exception": "Trace\\nError"}
"""
WORKER = """\
:actor_name:WorkerActor
2026-11-01 10:00:00,500 INFO workers.server worker serves worker_id='w1'
2026-11-01 10:00:04,500 INFO workers.inference call request_id='req_1' call='generate' outcome='served'
"""


@pytest.fixture
def run_dir(place: Path) -> RunDir:
    """Of a server that has ended."""
    made = rundir.create(8200)
    (made.logs / "gateway-0.log").write_text(GATEWAY)
    (made.logs / "orchestrator.log").write_text(ORCHESTRATOR)
    workers = made.path / "ray" / "session_2026-11-01" / "logs"
    workers.mkdir(parents=True)
    (workers / "worker-abc0-ffff-4242.err").write_text(WORKER)
    (workers / "worker-abc0-ffff-4242.out").touch()
    (workers / "gcs_server.out").write_text("not ours\n")
    return made


def test_entries_of_all_processes_come_in_the_order_of_time(hostler: Hostler, run_dir: RunDir) -> None:
    result = hostler("logs")
    assert result.exit_code == 0, result.output
    heads = [line.split(maxsplit=4)[1:5] for line in result.output.splitlines() if not line.startswith((" ", "-"))]
    assert [(moment[6:], process) for moment, _, process, _ in heads] == [
        ("00.500", "worker-4242"),
        ("01.000", "gateway-0"),
        ("02.000", "orchestrator"),
        ("03.500", "gateway-0"),
        ("04.000", "orchestrator"),
        ("04.500", "worker-4242"),
        ("05.000", "gateway-0"),
    ]
    assert "a try failed request_id=req_2 reason=unavailable\n    Traceback" in result.output
    assert "not ours" not in result.output


def test_one_request_is_found_in_every_process(hostler: Hostler, run_dir: RunDir) -> None:
    result = hostler("logs", "--request-id", "req_1", "--json")
    entries = [json.loads(line) for line in result.output.splitlines()]
    assert [(entry["process"], entry["message"]) for entry in entries] == [
        ("gateway-0", "request"),
        ("worker-4242", "call"),
    ]
    assert entries[0]["status"] == 200
    assert entries[1]["outcome"] == "served"


def test_a_choice_by_level_process_number_and_time(hostler: Hostler, run_dir: RunDir) -> None:
    def shown(*words: str) -> list[str]:
        result = hostler("logs", "--json", *words)
        assert result.exit_code == 0, result.output
        return [json.loads(line)["message"] for line in result.output.splitlines()]

    assert shown("--level", "error") == ["x", "unexpected exception"]
    assert shown("--lines", "2") == ["call", "unexpected exception"]
    assert shown("--lines", "0") == []
    assert shown("worker", "--lines", "1") == ["call"]
    assert shown("gateway-0", "--since", "2026-11-01T10:00:02") == ["a try failed", "unexpected exception"]
    assert shown("--since", "10m") == []


def test_what_is_no_choice_is_refused(hostler: Hostler, run_dir: RunDir) -> None:
    for words, said in (
        (("gatewai",), "there are: gateway-0, orchestrator, worker-4242"),
        (("--level", "loud"), "debug, info, warning"),
        (("--since", "yesterday"), "write 10m, 2h"),
    ):
        result = hostler("logs", *words)
        assert result.exit_code == 2
        assert said in result.output


def test_of_several_servers_that_ended_one_must_be_named(hostler: Hostler, run_dir: RunDir) -> None:
    rundir.create(8201)
    result = hostler("logs")
    assert result.exit_code == 1
    assert "ports 8200, 8201" in result.output
    assert hostler("logs", "--port", "8200").exit_code == 0
    assert "no hostler is running on port 8300" in hostler("logs", "--port", "8300").output


def test_the_run_before_is_shown_too(hostler: Hostler, run_dir: RunDir) -> None:
    (run_dir.logs / "gateway-0.log.1").write_text("2026-11-01 09:00:00,000 INFO gateway earlier\n")
    first = hostler("logs", "--json", "gateway").output.splitlines()[0]
    assert json.loads(first)["message"] == "earlier"


def test_a_terminal_is_told_nothing_that_it_would_obey(run_dir: RunDir) -> None:
    path = {
        "time": "2026-11-01 10:00:00,000",
        "level": "INFO",
        "logger": "g",
        "message": "r",
        "path": "/\x1b]0;x\x07\n",
    }
    (entry,) = log_lines.entries([json.dumps(path), "\x1b[33mcoloured\x1b[0m \x9b2J"], "gateway-0")
    shown = log_lines.as_text(entry, 9)
    assert shown.splitlines()[1] == "    coloured \\x9b2J"
    assert all(character == "\n" or character.isprintable() for character in shown)


def test_fields_are_read_back_as_they_were_written() -> None:
    line = "2026-11-01 10:00:00,000 INFO a.b what was said a='x y' b=3 c=['p', 'q'] d=None e=\"it's\""
    entry = log_lines.parse(line, "p")
    assert entry is not None
    assert entry.message == "what was said"
    assert entry.fields == {"a": "x y", "b": 3, "c": ["p", "q"], "d": None, "e": "it's"}
    plain = log_lines.parse("2026-11-01 10:00:00,000 INFO a.b 1 = 2, a=b and so on", "p")
    assert plain is not None
    assert (plain.message, plain.fields) == ("1 = 2, a=b and so on", {})


def test_since_means_a_span_or_a_moment() -> None:
    now = time.mktime((2026, 11, 1, 12, 0, 0, 0, 0, -1))
    assert log_lines.read_since("10m", now) == now - 600
    assert log_lines.read_since("1.5h", now) == now - 5400
    assert log_lines.read_since("11:30", now) == now - 1800
    assert log_lines.read_since("2026-11-01 11:00", now) == now - 3600
    with pytest.raises(ValueError, match="soon"):
        log_lines.read_since("soon", now)


def test_following_goes_on_through_a_restart_a_new_process_and_an_emptied_file(run_dir: RunDir) -> None:
    path = run_dir.logs / "gateway-0.log"
    tail = log_files.Tail(log_files.LogFile("gateway-0", path))
    tail.to_end()
    assert tail.news() == []
    with path.open("a") as file:
        file.write("whole\nha")
    assert tail.news() == ["whole"]
    with path.open("a") as file:
        file.write("lf\n")
    assert tail.news() == ["half"]
    os.truncate(path, 0)
    with path.open("a") as file:
        file.write("emptied\n")
    assert tail.news() == ["emptied"]
    path.replace(run_dir.logs / "gateway-0.log.1")
    path.write_text("another, and a longer one than before\n")
    assert tail.news() == ["another, and a longer one than before"]
    path.unlink()
    assert tail.news() == []


@pytest.fixture
def follower(run_dir: RunDir) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "logs", "--follow", "--lines", "1", "--json", "--level", "info"],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "proto"},
    )
    yield process
    process.kill()
    process.communicate()


def test_follow_shows_what_comes(run_dir: RunDir, follower: subprocess.Popen[str]) -> None:
    assert follower.stdout is not None
    assert json.loads(follower.stdout.readline())["message"] == "unexpected exception"
    with (run_dir.logs / "orchestrator.log").open("a") as file:
        file.write("2026-11-01 10:00:06,000 DEBUG o not this\n2026-11-01 10:00:07,000 INFO o but this\n")
    assert json.loads(follower.stdout.readline())["message"] == "but this"
    (run_dir.logs / "gateway-1.log").write_text("2026-11-01 10:00:08,000 INFO g a new process\n")
    assert json.loads(follower.stdout.readline())["process"] == "gateway-1"


def test_a_file_that_has_grown_large_is_emptied_and_its_writer_goes_on(run_dir: RunDir) -> None:
    path = run_dir.logs / "gateway-0.log"
    path.unlink()
    with path.open("ab", buffering=0) as writer:  # as the supervisor opens it for its children
        writer.write(b"x" * 999 + b"\n")
        assert log_files.keep_small(run_dir, max_bytes=1000) == []
        writer.write(b"more\n")
        assert log_files.keep_small(run_dir, max_bytes=1000) == [path]
        assert path.stat().st_size == 0
        writer.write(b"after\n")
    assert path.read_bytes() == b"after\n"  # no hole where the old part was
    assert (run_dir.logs / "gateway-0.log.1").read_bytes() == b"x" * 999 + b"\nmore\n"


def test_workers_files_are_kept_small_too_and_both_parts_are_read(hostler: Hostler, run_dir: RunDir) -> None:
    (worker,) = run_dir.path.glob("ray/*/logs/worker-*.err")
    assert log_files.keep_small(run_dir, max_bytes=150) != []
    assert worker.stat().st_size == 0
    worker.write_text("2026-11-01 10:01:00,000 INFO workers.inference later\n")
    shown = hostler("logs", "worker", "--json").output.splitlines()
    assert [json.loads(line)["message"] for line in shown][-2:] == ["call", "later"]
    assert log_files.keep_small(run_dir, max_bytes=150) == []  # what was moved out is not moved again


def test_without_room_for_the_old_part_the_file_is_emptied_all_the_same(run_dir: RunDir) -> None:
    path, before = run_dir.logs / "gateway-0.log", run_dir.logs / "gateway-0.log.1"
    before.symlink_to("/dev/full")  # every write: no space left on the device
    assert path in log_files.keep_small(run_dir, max_bytes=10)
    assert path.stat().st_size == 0
    assert not before.is_symlink()

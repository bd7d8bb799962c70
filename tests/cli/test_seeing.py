"""ps, plan and events: the pure drawing of each, and the commands against a fake server."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from hostler import rundir
from hostler.placement.v1 import placement_pb2 as pb
from hostler.placement_json import plan_json, status_json
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import Result

from cli import event_words, plan_words, restarts, servers
from cli.ps_screen import Segment, cells, draw_status, segments
from cli.supervisor import Event

from .fakes import GIB, FakeServer, event
from .fakes import status as fake_status

Hostler = Callable[..., Result]
NOW = 1_700_000_600.0


def values(status: pb.GetStatusResponse | None = None) -> dict[str, Any]:
    return {"port": 8000, "pid": 1, **status_json(status or fake_status(), int(NOW * 1000))}


def drawn(shown: dict[str, Any], width: int = 100, plain: bool = True) -> str:
    console = Console(width=width, color_system=None, force_terminal=not plain)
    with console.capture() as capture:
        console.print(draw_status(shown, width, plain=plain))
    return capture.get()


def device(**fields: Any) -> dict[str, Any]:
    usual = {"id": "cuda:0", "node": None, "name": "", "reserved_bytes": 0, "budget_bytes": 0, "foreign_bytes": 0}
    return usual | {"total_bytes": None} | fields


def replica(model: str, kv_bytes: int, **parts: int) -> dict[str, Any]:
    held = [{"device": name.replace("_", ":"), "num_bytes": num_bytes} for name, num_bytes in parts.items()]
    return {"model": model, "kv_reserved_bytes": kv_bytes, "parts": held}


# ---------------------------------------------------------------- ps


def test_a_device_s_memory_is_told_whole() -> None:
    found = segments(
        device(total_bytes=100, budget_bytes=80, reserved_bytes=50, foreign_bytes=10),
        [replica("a", 10, cuda_0=30), replica("b", 6, cuda_0=10, cuda_1=20), replica("c", 0)],
    )
    assert found == [
        Segment("weights", 20, "a"),
        Segment("kv", 10, "a"),
        Segment("weights", 8, "b"),
        Segment("kv", 2, "b"),  # its third of the devices holds a third of its cache
        Segment("set aside", 10),
        Segment("others", 10),
        Segment("free", 30),
        Segment("outside", 10),
    ]
    assert sum(segment.num_bytes for segment in found) == 100


def test_free_memory_is_what_others_leave_of_the_budget() -> None:
    (others, free) = segments(device(total_bytes=100, budget_bytes=80, foreign_bytes=70), [])
    assert (others.num_bytes, free.num_bytes) == (70, 30)
    (free,) = segments(device(budget_bytes=80), [])
    assert free == Segment("free", 80)


@given(st.lists(st.integers(0, 2**40), max_size=12), st.integers(12, 140))
def test_a_bar_is_as_wide_as_it_should_be_and_leaves_nothing_out(amounts: list[int], width: int) -> None:
    shares = cells(amounts, width)
    assert sum(shares) == (width if any(amounts) else 0)
    assert all((share > 0) == (amount > 0) for share, amount in zip(shares, amounts, strict=True))


def test_without_colours_every_model_has_a_letter() -> None:
    text = drawn(values(), width=98)
    (bar,) = re.findall(r"^\[(.*)\]$", text, re.MULTILINE)
    assert len(bar) == 96
    assert [bar.count(mark) for mark in "Aa#."] == [6, 6, 6, 36]
    assert "A tiny 2.0 GiB (1.0 GiB KV)" in text
    assert "# other programs 1.0 GiB" in text
    assert "█" not in text


def test_with_colours_every_model_has_one() -> None:
    console = Console(width=80, color_system="standard", force_terminal=True)
    with console.capture() as capture:
        console.print(draw_status(values(), 80, plain=False))
    assert "\x1b[36m█████" in capture.get()
    assert "\x1b[36m▓▓▓▓▓" in capture.get()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_screen_fits_the_terminal_and_says_why(width: int) -> None:
    text = drawn(values(), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for word in ("tiny", "ready", "3/16 +1", "41", "the only device", "2.0 GiB of 8.0 GiB, 16.0 GiB in all"):
        assert word in words
    assert "broken failed: no space left on the disk" in words
    assert "Not loaded: later" in words
    assert "asleep: 512 MiB of 4.0 GiB host memory · 1 blank worker stands ready" in words
    assert ("KV CACHE" in text, " WHY" in text) == (width >= 100, width >= 120)


def test_a_sleeper_is_on_its_host_with_what_it_holds_there() -> None:
    (row,) = [line for line in drawn(values(), 120).splitlines() if line.startswith("napper (pinned)")]
    assert row.split()[2:5] == ["asleep", "host", "512"]


def test_several_nodes_have_a_heading_each() -> None:
    status = fake_status()
    status.nodes.add(id="node-2")
    far = status.devices.add(id="node-2/cuda:0", node="node-2", budget_bytes=GIB)
    status.replicas[0].node = "node-2"
    status.replicas[0].parts[0].device = far.id
    text = drawn(values(status))
    assert text.index("node (this one)") < text.index("\ncpu") < text.index("node node-2") < text.index("node-2/cuda:0")


def test_many_devices_have_a_line_each_and_one_legend_for_all() -> None:
    status = fake_status()
    for number in range(8):
        status.devices.add(id=f"cuda:{number}", budget_bytes=80 * GIB, reserved_bytes=10 * GIB)
        status.replicas[0].parts.add(device=f"cuda:{number}", num_bytes=10 * GIB)
    text = drawn(values(status), 80)
    rows = [line for line in text.splitlines() if line.startswith("cuda:")]
    assert len(rows) == 8
    assert all("10.0 GiB of 80.0 GiB" in row and row.count("A") >= 3 for row in rows)
    assert len({len(re.findall(r"\[.*\]", row)[0]) for row in rows}) == 1
    assert "cpu +8" in next(line for line in text.splitlines() if line.startswith("tiny "))
    assert text.count("A tiny 82.0 GiB (1.0 GiB KV)") == 1
    assert max(map(len, text.splitlines())) <= 80


def test_a_server_without_models_says_how_to_get_one() -> None:
    empty = pb.GetStatusResponse(version="1")
    assert "hostler serve MODEL" in drawn(values(empty))
    empty.models.add(name="later")
    assert "Nothing is loaded. Models: later" in drawn(values(empty))


def test_ps_json_has_plain_numbers_and_words(hostler: Hostler, server: FakeServer) -> None:
    shown = json.loads(hostler("ps", "--json").stdout)
    assert (shown["port"], shown["pid"]) == (8123, os.getpid())
    assert shown["devices"][0]["budget_bytes"] == 8 * GIB
    tiny, napper = shown["replicas"]
    assert (tiny["model"], tiny["state"], tiny["pid"]) == ("tiny", "ready", 4242)
    assert tiny["parts"] == [{"device": "cpu", "num_bytes": 2 * GIB}]
    assert (tiny["num_running"], tiny["num_queued"], tiny["max_running"]) == (3, 1, 16)
    assert (tiny["idle_s"], tiny["completion_tokens_per_s"]) == (0.0, 41.3)
    assert (napper["state"], napper["parts"], napper["host_bytes"]) == ("asleep", [], GIB // 2)


def test_ps_in_a_pipe_is_plain_and_as_wide_as_asked(
    hostler: Hostler, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = hostler("ps").stdout
    assert "\x1b" not in text
    assert "[A" in text
    for word in ("cpu", "8.0 GiB", "tiny", "ready", "3/16", "the only device"):
        assert word in text


# ---------------------------------------------------------------- plan


def test_a_plan_says_where_who_gives_way_how_long_and_why(hostler: Hostler, server: FakeServer) -> None:
    text = hostler("plan", "tiny").stdout
    assert text.splitlines()[0] == "tiny would go to cpu, after others have given way"
    words = " ".join(text.split())
    for line in (
        "needs 3.0 GiB (with int4 weights, 1.0 GiB of it KV cache)",
        "puts to sleep napper",
        "unloads other",
        "ready in about 12 s",
        "why other is idle longest",
    ):
        assert line in words
    plan = json.loads(hostler("plan", "tiny", "--json").stdout)
    assert (plan["feasible"], plan["evict_models"], plan["sleep_models"]) == (True, ["other"], ["napper"])
    assert plan["parts"] == [{"device": "cpu", "num_bytes": 3 * GIB}]
    assert (plan["expected_ms"], plan["quantize"], plan["lacking_bytes"]) == (12_000, "int4", None)


def test_a_plan_that_cannot_be_fails_and_says_what_would_help(hostler: Hostler, server: FakeServer) -> None:
    server.placement.plan = pb.PlanModelResponse(
        needed_bytes=9 * GIB,
        lacking_bytes=GIB,
        reason="cpu has 8 GiB",
        advice=["quantize: int8 (5 GiB)", "unpin napper"],
    )
    result = hostler("plan", "tiny")
    assert result.exit_code == 1
    assert "hostler ps" in result.stderr
    words = " ".join(result.stdout.split())
    assert words.startswith("tiny cannot be brought up now needs 9.0 GiB lacks 1.0 GiB why cpu has 8 GiB")
    assert words.endswith("would help quantize: int8 (5 GiB) would help unpin napper")
    as_json = hostler("plan", "tiny", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["advice"] == ["quantize: int8 (5 GiB)", "unpin napper"]


def test_a_sleeper_would_be_woken_and_a_large_model_split() -> None:
    parts = [pb.DeviceBytes(device="cuda:0", num_bytes=GIB), pb.DeviceBytes(device="cuda:1", num_bytes=GIB)]
    woken = plan_json("m", pb.PlanModelResponse(feasible=True, wakes=True, parts=parts, shrink_models=["a", "b"]))
    assert plan_words.verdict(woken) == "m would be woken on cuda:0, cuda:1, after others have given way"
    assert plan_words.lines(woken) == [
        ("split over", "cuda:0 1.0 GiB, cuda:1 1.0 GiB"),
        ("shrinks", "the KV cache of a, b"),
    ]


# ---------------------------------------------------------------- events


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("EVICTED", {"num_bytes": 5 * GIB}, "evicted tiny from cuda:0 (5.0 GiB)"),
        ("READY", {"duration_ms": 3210}, "tiny is ready on cuda:0 (3.2 s)"),
        ("PLACED", {"num_bytes": GIB}, "placing tiny on cuda:0 (1.0 GiB)"),
        ("ASLEEP", {"num_bytes": GIB, "duration_ms": 150}, "put tiny to sleep, off cuda:0 (1.0 GiB, 0.1 s)"),
        ("WAITING", {"device": ""}, "tiny waits for memory"),
        ("DEVICE_LOST", {"model": ""}, "lost device cuda:0"),
        ("FOREIGN_MEMORY", {"model": "", "num_bytes": GIB}, "other programs on cuda:0 (1.0 GiB)"),
    ],
)
def test_an_event_is_told_in_words(kind: str, fields: dict[str, Any], words: str) -> None:
    from hostler.placement_json import event_json

    assert event_words.what(event_json(event(1, pb.EventKind.Value(f"EVENT_KIND_{kind}"), **fields))) == words


def test_every_kind_of_event_has_words_and_a_newer_one_its_number() -> None:
    from hostler.placement_json import event_json, event_kind

    for kind in list(pb.EventKind.values())[1:]:
        assert not event_words.what(event_json(event(1, kind))).startswith(event_kind(kind) + ":")
    assert event_kind(99) == "99"  # type: ignore[arg-type]


def test_today_s_events_have_a_time_and_others_a_date() -> None:
    assert event_words.when(int(NOW * 1000), NOW) == time.strftime("%H:%M:%S", time.localtime(NOW))
    assert event_words.when(int((NOW - 86_400) * 1000), NOW).startswith("2023-11-1")


def test_past_events_are_lines_oldest_first(hostler: Hostler, server: FakeServer) -> None:
    server.placement.past = [event(number, why=f"reason {number}") for number in range(1, 6)]
    lines = hostler("events", "-n", "2").stdout.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "evicted tiny from cuda:0: reason 4",
        "evicted tiny from cuda:0: reason 5",
    ]
    listed = [json.loads(line) for line in hostler("events", "--json").stdout.splitlines()]
    assert [item["number"] for item in listed] == [1, 2, 3, 4, 5]
    assert (listed[0]["kind"], listed[0]["why"]) == ("evicted", "reason 1")


def test_no_events_are_no_lines_but_a_word(hostler: Hostler, server: FakeServer) -> None:
    result = hostler("events")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing has happened" in result.stderr


def test_following_goes_on_over_a_restart_of_the_orchestrator_and_shows_nothing_twice(
    hostler: Hostler, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.seeing._RETRY_S", 0.01)
    server.placement.past = [event(1, why="before")]
    server.placement.news.put(event(2, why="as it happens"))
    server.placement.news.put(None)  # the orchestrator goes away; what it remembers comes once more
    server.placement.news.put(event(1, why="a new life", unix_ms=1_800_000_000_000))
    server.placement.news.put(None)
    find, looks = servers.find, iter(range(3))

    def until_stopped(port: int | None) -> servers.Server:
        if next(looks) == 2:
            raise KeyboardInterrupt
        return find(port)

    monkeypatch.setattr(servers, "find", until_stopped)
    result = hostler("events", "--follow", "--json")
    assert result.exit_code == 130
    assert [json.loads(line)["why"] for line in result.stdout.splitlines()] == ["before", "as it happens", "a new life"]
    assert result.stderr.count("orchestrator does not answer") == 2


# ---------------------------------------------------------------- completion


def test_completion_knows_the_names_and_aliases_of_live_servers() -> None:
    fake = FakeServer(8126, {"models": [{"name": "tiny", "aliases": ["org/Tiny"]}, {"name": "Other"}]})
    try:
        assert servers.complete_model("t") == ["tiny"]
        assert servers.complete_model("o") == ["Other", "org/Tiny"]
    finally:
        fake.close()
    assert servers.complete_model("t") == []


def test_processes_that_keep_ending_are_told_also_when_the_orchestrator_is_one_of_them(
    hostler: Callable[..., Any], server: FakeServer
) -> None:
    run_dir = rundir.run_dir(8123)
    restarts.note(run_dir, Event("ended", "orchestrator", 7, 3, num_short_lives=4, restart_in_s=1.6))
    restarts.note(run_dir, Event("ended", "gateway-0", 8, -9, num_short_lives=1, restart_in_s=0.2))
    told = " ".join(hostler("ps").stdout.split())
    assert "orchestrator keeps ending: 4 times in a row" in told
    assert "(exit code 3)" in told
    assert "gateway-0 ended" in told
    assert "(signal 9)" in told
    shown = json.loads(hostler("ps", "--json").stdout)["restarts"]
    assert [(entry["process"], entry["num_in_a_row"]) for entry in shown] == [("orchestrator", 4), ("gateway-0", 1)]
    server.lose_orchestrator()
    away = hostler("ps")
    assert away.exit_code == 1
    assert "orchestrator keeps ending: 4 times in a row" in " ".join(away.output.split())
    assert restarts.recent(run_dir, time.time() + restarts.RECENT_S) == []
    restarts.clear(run_dir)
    assert restarts.recent(run_dir) == []

"""`make gpu` where there is no GPU: arithmetic, table, that no failure stops the rest, its steps in small."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("torch")

from tests.bench.gpu import __main__ as entry
from tests.bench.gpu import needs, table
from tests.bench.gpu.correctness import read_tally
from tests.bench.gpu.floor import DecodeFloor, rate, weights_read
from tests.bench.gpu.found import Failed, Found, NotRun, Outcome, Setting, Step, found_from
from tests.bench.gpu.running import ROOT, in_child, in_process, run_steps
from tests.bench.gpu.shapes import LLAMA_3B, LLAMA_8B, SMALL, Room, build, fits
from tests.bench.gpu.sharing import budget_bytes, seen_rightly, share
from tests.bench.gpu.speed import decode_window
from tests.bench_tests.test_engine import CountingEngine
from workers.engine import EngineStats, Event, GenerationRequest

HERE = Setting("cpu", True, 0, "")


def step(name: str, error: Exception | None = None, **figures: float) -> Step:
    def run(setting: Setting) -> Found:
        if error is not None:
            raise error
        found = Found(figures=figures)
        found.add(name, f"{sum(setting.figures.values()):g} before", 0.5, 0.7)
        return found

    return Step(name, run, 60)


def test_the_floor_is_what_a_step_must_read_over_what_memory_gives() -> None:
    floor = DecodeFloor(weight_bytes=16e9, kv_bytes=4e9, bandwidth_bytes_per_s=4e12)
    assert floor.step_s == pytest.approx(0.005)
    assert floor.share(0.010) == pytest.approx(0.5)
    assert weights_read(100, 30, tied=False) == 70
    assert weights_read(100, 30, tied=True) == 100
    assert (rate(8e12, 2), rate(110e9, 2)) == ("4.00 TB/s", "55.0 GB/s")


def test_shapes_are_those_of_the_models_that_they_are_named_for() -> None:
    assert LLAMA_8B.num_parameters == 8_030_261_248
    assert LLAMA_8B.kv_bytes_per_token == 131_072
    assert LLAMA_3B.num_parameters == 3_212_749_824


def test_a_smaller_shape_is_measured_where_disk_memory_or_card_are_too_small() -> None:
    plenty = 10**12
    assert fits(LLAMA_8B, Room(plenty, plenty, plenty))
    for room in (Room(15 * 10**9, plenty, plenty), Room(plenty, 30 * 10**9, plenty), Room(plenty, plenty, 24 * 10**9)):
        assert not fits(LLAMA_8B, room)
        assert fits(LLAMA_3B, room)


def test_a_failing_step_is_told_by_name_and_the_others_run() -> None:
    steps = [step("one", a=1.0), step("two", RuntimeError("broke")), step("three", Failed("wrong")), step("four", b=2)]
    steps += [step("five", NotRun("no card")), Step("six", steps[0].run, 60, {"no_such_module": "no-such-package"})]
    seen: list[int] = []
    outcomes = run_steps(steps, HERE, in_process, after=lambda so_far: seen.append(len(so_far)))
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "failed", "passed", "not run", "failed"]
    assert [outcome.why for outcome in outcomes[1:3]] == ["RuntimeError: broke", "wrong"]
    assert "no-such-package" in outcomes[5].why
    assert outcomes[3].found.lines[0].value == "1 before", "a step is given what earlier ones found"
    assert seen == [1, 2, 3, 4, 5, 6]
    assert table.verdict(outcomes) == "Failed: two, three, six. Not run: five. 0 of 2 goals reached."


def test_a_run_whose_time_is_over_begins_no_further_step() -> None:
    (outcome,) = run_steps([step("late")], HERE, in_process, within_s=0)
    assert outcome.status == "failed"
    assert "were over" in outcome.why


def test_a_step_that_hangs_or_dies_in_its_process_is_a_failed_step(tmp_path: Path) -> None:
    outcome = in_child(Step("machine", lambda _: Found(), 0.05), Setting("cpu", True, 0, str(tmp_path)))
    assert (outcome.status, outcome.why) == ("failed", "it took longer than 0 s and was ended")
    # No such step: the child refuses its command line and tells nothing.
    outcome = in_child(Step("nonsense", lambda _: Found(), 60), Setting("cpu", True, 0, str(tmp_path)))
    assert (outcome.status, outcome.why) == ("failed", "its process ended with status 2")


def test_the_table_and_the_file_hold_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Found(figures={"x": 3.0}, notices=["mind this"])
    good.add("decode", "5 ms", 0.75, 0.7)
    good.add("against the peer", "2 to 3", 2 / 3, 1.0, "×")
    outcomes = [Outcome("speed", "passed", found=good), Outcome("peer", "failed", "no memory")]
    table.show(outcomes, Console(width=150))
    shown = capsys.readouterr().out
    for part in ("decode", "75%", "≥ 70%", "✓", "0.67×", "≥ 1.00×", "FAILED", "no memory", "mind this"):
        assert part in shown
    assert "Failed: peer. 1 of 2 goals reached." in shown
    table.write(outcomes, tmp_path / "gpu.json")
    document = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert document["figures"] == {"x": 3.0}
    assert [item["status"] for item in document["steps"]] == ["passed", "failed"]
    assert found_from(asdict(good)) == good


def test_a_junit_report_is_counted() -> None:
    cases = "<testcase name='a'/><testcase name='b'><failure/></testcase><testcase name='c'><skipped/></testcase>"
    tally = read_tally(f"<testsuites><testsuite>{cases}<testcase name='d'><error/></testcase></testsuite></testsuites>")
    assert (tally.passed, tally.skipped, tally.failed) == (1, 1, ("b", "d"))


class SteadyEngine(CountingEngine):
    """Every step yields one token of one request, for as long as it asks; each holds ten bytes of cache."""

    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=self.num_steps, num_completion_tokens_total=self.num_steps, kv_used_bytes=10 * len(self.order)
        )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        async for event in super().generate(request):
            yield event
            await asyncio.sleep(0)


async def test_steps_are_counted_only_while_all_rows_decode() -> None:
    engine = SteadyEngine()
    window = await decode_window(engine, 1, 40, 20, 4, 7)
    assert (window.rows, window.tokens_per_step, window.kv_bytes) == (1, 1.0, 10)
    assert len(engine.order[0].prompt.ids) == 40  # type: ignore[union-attr]
    with pytest.raises(Failed, match="stood still"):  # one of four rows gets a token in each of these steps
        await decode_window(SteadyEngine(), 4, 40, 20, 4, 7)


def test_missing_packages_are_named_and_nothing_else_happens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needs.missing({"json": "a", "no_such_module": "b-package", "no_such.module": "c-package"}) == [
        "b-package",
        "c-package",
    ]
    monkeypatch.setattr(entry, "ENGINE", {**needs.ENGINE, "no_such_module": "no-such-package"})
    assert entry.main([]) == 1
    told = capsys.readouterr()
    assert "no-such-package" in told.out
    assert "torch" not in told.out
    assert "Traceback" not in told.out + told.err


def test_an_interpreter_that_has_nothing_is_told_so_without_a_traceback() -> None:
    # -S: without site-packages, so without torch and all others.
    command = [sys.executable, "-S", "-E", "-m", "tests.bench.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch, numpy, transformers" in done.stdout
    assert "Traceback" not in done.stderr


def test_without_a_cuda_device_it_says_so_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "_has_cuda", lambda: False)
    assert entry.main([]) == 0
    assert entry.NO_DEVICE in capsys.readouterr().out


@pytest.fixture
def no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve through torch alone, as a GPU does, and compile nothing."""
    monkeypatch.setenv("HOSTLER_KERNELS_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("CXX", "/nowhere/c++")


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_kernels")
def test_the_steps_run_in_small_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "gpu.json"
    chosen = ["--only", "machine", "speed", "peer", "moving", "stranger"]
    options = ["--small", "--device", "cpu", "--in-process", "--layers", "1", "--write", str(report)]
    assert entry.main([*options, "--folder", str(tmp_path / "models"), *chosen]) == 0, capsys.readouterr().out
    document = json.loads(report.read_text(encoding="utf-8"))
    statuses = {item["step"]: item["status"] for item in document["steps"]}
    assert statuses == dict.fromkeys(chosen[1:5], "passed") | {"stranger": "not run"}
    figures = document["figures"]
    assert figures["decode_4_64_share"] == pytest.approx(figures["decode_4_64_floor_s"] / figures["decode_4_64_step_s"])
    assert figures["decode_1_16_floor_s"] < figures["decode_4_64_floor_s"], "keys and values are read, too"
    assert figures["streams_over_peer"] == pytest.approx(figures["streams_tokens_per_s"] / figures["peer_tokens_per_s"])
    assert min(figures[name] for name in ("load_s", "sleep_s", "wake_s", "prefill_tokens_per_s")) > 0
    assert "cut to 1 layers" in capsys.readouterr().out


@pytest.mark.usefixtures("no_kernels")
async def test_models_that_share_a_card_are_held_against_their_budgets(tmp_path: Path) -> None:
    folder = await asyncio.to_thread(build, SMALL, tmp_path / "model", "cpu")
    assert budget_bytes(folder) > SMALL.weight_bytes + 2**29
    reserved = iter((0, 4, 4, 8, 8, 12, 12) * 2)
    found = await share(folder, "cpu", 4, lambda: next(reserved))
    assert found.figures["sharing_reserved_bytes"] == 12
    with pytest.raises(Failed, match="one by one"):
        await share(folder, "cpu", 3, lambda: next(reserved))


def test_a_strangers_memory_must_be_seen_while_it_is_held_and_not_after() -> None:
    assert seen_rightly(70 * 2**30, 71 * 2**30, 0).lines
    for seen, left in ((69, 0), (75, 0), (71, 70)):
        with pytest.raises(Failed):
            seen_rightly(70 * 2**30, seen * 2**30, left * 2**30)

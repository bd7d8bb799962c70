"""The report shows medians, leaves out what was not measured, and says what a reader must know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.floor import ClientFloor
from tests.bench.report import Contestant, Report
from tests.bench.results import Round, ScenarioResult, StepPart

from .rounds import level, one_round

SCENARIO = ScenarioResult("second_turn", "second turn", 0.2, 0.25, "20 ms / 100 ms")


def report(*rounds: Round) -> Report:
    peers = [Contestant("hostler", "hostler (bf16)", 200_000_000), Contestant("vllm", "vLLM", 200_000_000)]
    machine = {"cpu": "a processor", "cores": 2, "time": "2026-01-02 03:04:05"}
    return Report(machine, "a-model", 128, 20e9, ClientFloor(50_000.0, 20.0, 0.001), peers, list(rounds))


def cells(made: Report, label: str) -> list[str]:
    return next(row[2:] for row in made.figures().rows if row[1] == label)


def test_each_contestant_has_a_column_with_the_median_of_its_rounds() -> None:
    rounds = [one_round("hostler", n, 5.0, level(1, tokens_per_s=v)) for n, v in enumerate((10.0, 90.0, 30.0))]
    made = report(*rounds, one_round("vllm", 0, 60.0))
    assert made.figures().head[2:] == ["hostler", "vllm"]
    assert cells(made, "tokens/s, all streams") == ["30.0", "50.0"]
    assert cells(made, "start to first text") == ["5,000 ms", "60.0 s"]


def test_a_load_that_a_peer_does_not_serve_is_a_dash() -> None:
    made = report(one_round("hostler", 0, 5.0, level(16, tokens_per_s=300.0)), one_round("vllm"))
    rows = [row for row in made.figures().rows if row[:2] == ["16 streams", "tokens/s, all streams"]]
    assert rows == [["16 streams", "tokens/s, all streams", "300.0", "-"]]


def test_an_advantage_above_one_means_better_whichever_way_the_metric_points() -> None:
    ours = one_round("hostler", 0, 5.0, level(1, tokens_per_s=100.0, ttft_p50_s=0.1, memory_bytes=2**30))
    theirs = one_round("vllm", 0, 50.0, level(1, tokens_per_s=50.0, ttft_p50_s=0.4, memory_bytes=3 * 2**30))
    grid = report(ours, theirs).advantages()
    assert grid is not None
    assert {row[1]: row[2] for row in grid.rows} == {
        "start": "10.00×",
        "tokens/s, all streams, 1 stream": "2.00×",
        "first token p50, 1 stream": "4.00×",
        "memory, all processes, 1 stream": "3.00×",
    }


def test_without_a_peer_there_is_nothing_to_compare() -> None:
    made = report(one_round("hostler"))
    made.peers = made.peers[:1]
    assert made.advantages() is None


def test_the_floor_says_what_share_of_the_bandwidth_one_stream_reaches() -> None:
    made = report(one_round("hostler", 0, 5.0, level(1, inter_token_p50_s=0.02)))
    assert made.floors().rows[0][2:] == ["200 MB", "10.0 ms", "100", "20 ms", "50%"]
    assert made.floors().rows[1][-2:] == ["-", "-"]


def test_scenarios_stand_in_the_table_and_among_the_goals() -> None:
    slow = replace(SCENARIO, ratio=0.6)
    made = report(replace(one_round("hostler"), scenarios=(SCENARIO,)), one_round("vllm"))
    assert cells(made, "second turn (goal ≤ 0.25×)") == ["0.20×", "-"]
    assert any(line.startswith("✓ hostler, round 1: second turn: 0.20×") for line in made.goal_lines())
    missed = report(replace(one_round("hostler"), scenarios=(slow,)))
    assert any(line.startswith("✗ hostler, round 1: second turn: 0.60×") for line in missed.goal_lines())


def test_an_engine_that_tells_where_its_step_goes_is_quoted_with_shares() -> None:
    parts = (StepPart("linear layers", 9.0), StepPart("attention", 1.0))
    text = report(replace(one_round("hostler"), step_parts=parts)).markdown()
    assert "hostler, a decode step of 1 rows: 10.00 ms: linear layers 9.00 ms (90%), attention 1.00 ms (10%)" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_prompt_tokens": 120}, "Prompt tokens differ: "),
        ({"is_counted_by_server": False}, "Tokens counted by events, for want of usage: vllm."),
        ({"failed": 2}, "2 streams failed and are not in the figures."),
    ],
)
def test_what_makes_a_comparison_unfair_is_said(changed: dict[str, float], said: str) -> None:
    fair = report(one_round("hostler"), one_round("vllm"))
    unfair = report(one_round("hostler"), one_round("vllm", 0, 9.0, level(1, **changed)))
    assert not any(said in remark for remark in fair.remarks())
    assert any(said in remark for remark in unfair.remarks())


def test_a_saved_run_holds_figures_and_outcomes(tmp_path: Path) -> None:
    files = report(one_round("hostler", 0, 5.0), one_round("vllm", 0, 50.0)).save(tmp_path)
    assert [path.name for path in files] == ["bench-2026-01-02-030405.json", "bench-2026-01-02-030405.md"]
    document = json.loads(files[0].read_text())
    start = next(goal for goal in document["goals"] if goal["metric"] == "start")
    assert (start["measured"], start["is_met"]) == (pytest.approx(0.1), True)
    assert "| hostler | vllm |" in files[1].read_text()

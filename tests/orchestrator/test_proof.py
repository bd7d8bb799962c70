"""The scheduler's proof, in small: some thousand random steps hold every invariant, and every planted bug is found."""

from __future__ import annotations

import pytest

from tests.orchestrator.proof.bugs import BUGS
from tests.orchestrator.proof.shrink import carry_out, run_of

NUM_RUNS, NUM_STEPS = 60, 60
FOUND_WITHIN_RUNS = 120


@pytest.mark.parametrize("seed", range(3))
def test_nothing_breaks_in_random_runs(seed: int) -> None:
    for number in range(NUM_RUNS // 3):
        outcome = carry_out(run_of(seed, number, NUM_STEPS))
        assert outcome.breach is None, f"run {number} of seed {seed}: {outcome.breach}"


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[bug](monkeypatch)
    assert any(carry_out(run_of(5, n, NUM_STEPS)).breach is not None for n in range(FOUND_WITHIN_RUNS))

"""The short form of `make soak`: real workers on virtual devices that cannot hold all models at once."""

from __future__ import annotations

import itertools
import os

import pytest

from tests.models import tiny
from tests.soak.run import soak
from tests.soak.trace import make_trace

pytestmark = [pytest.mark.timeout(280)]


@pytest.mark.journey
@pytest.mark.skipif(
    "HOSTLER_TEST_SOAK" not in os.environ,
    reason="Ray starts one worker at a time, and one that is killed while it starts holds the next up for a minute",
)
def test_five_models_on_devices_for_three_serve_every_request_within_their_memory() -> None:
    models = {f"tiny-{name}": tiny.tiny_model(name) for name in sorted(tiny.ARCHITECTURES)[:5]}
    outcome = soak(models, num_requests=120, duration_s=40, seed=7)
    assert outcome.faults == []
    assert len(outcome.waits_s) == 120
    assert outcome.observed.num_measured > 20
    assert outcome.observed.kinds.get("asleep", 0) + outcome.observed.kinds.get("evicted", 0) > 5


def test_a_trace_is_the_same_for_the_same_seed_and_holds_every_model() -> None:
    names = ["a", "b", "c", "d", "e"]
    one, two = make_trace(names, 500, 100, 4, seed=3), make_trace(names, 500, 100, 4, seed=3)
    assert one == two
    assert {arrival.model for arrival in one} == set(names)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(one))
    assert 50 < one[-1].at_s < 200

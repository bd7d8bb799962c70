"""How long and how many the cache's slots are, on devices that commit memory lazily and on those that do not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.text.loader import choose_slots


@given(st.integers(64, 200_000), st.integers(64, 2_000_000), st.integers(1, 256))
def test_slots_never_exceed_the_budget_where_memory_is_real(context: int, budget: int, max_running: int) -> None:
    capacity, slots = choose_slots(context, budget, max_running, reserves_lazily=False)
    assert 1 <= capacity <= context
    assert 1 <= slots <= max_running
    assert capacity * slots <= budget


def test_a_lazy_device_gives_everyone_the_whole_context() -> None:
    assert choose_slots(8192, 100_000, 16, reserves_lazily=True) == (8192, 16)
    assert choose_slots(8192, 5000, 16, reserves_lazily=True) == (5000, 16)


def test_a_long_context_still_leaves_several_slots() -> None:
    assert choose_slots(131_072, 80_000, 16, reserves_lazily=False) == (20_000, 4)
    assert choose_slots(2048, 80_000, 16, reserves_lazily=False) == (2048, 16)

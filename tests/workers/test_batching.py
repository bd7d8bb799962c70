"""Which texts run together: of like length, within the budget, the eldest among them, and nobody for ever later."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.embedding.batching import choose_batch


def test_texts_of_like_length_go_together() -> None:
    lengths = [100, 11, 98, 400, 12, 99]
    assert sorted(choose_batch(lengths, 4096, 64)) == [0, 2, 5]
    assert sorted(choose_batch(lengths[1:], 4096, 64)) == [0, 3]


def test_the_budget_counts_padding_and_one_text_may_exceed_it() -> None:
    assert len(choose_batch([100] * 50, 1000, 64)) == 10
    assert choose_batch([5000, 1], 1000, 64) == [0]
    assert len(choose_batch([1] * 50, 1000, 8)) == 8


@given(st.lists(st.integers(1, 600), min_size=1, max_size=80), st.integers(16, 2000), st.integers(1, 32))
def test_every_batch_holds_the_eldest_once_and_stays_in_bounds(lengths: list[int], tokens: int, texts: int) -> None:
    waiting = list(enumerate(lengths))
    served: list[int] = []
    while waiting:
        chosen = choose_batch([length for _, length in waiting], tokens, texts)
        assert 0 in chosen
        assert len(set(chosen)) == len(chosen) <= texts
        batch = [waiting[i][1] for i in chosen]
        assert len(batch) == 1 or len(batch) * max(batch) <= tokens
        served += [waiting[i][0] for i in chosen]
        waiting = [item for i, item in enumerate(waiting) if i not in set(chosen)]
    assert sorted(served) == list(range(len(lengths)))

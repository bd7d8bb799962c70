"""The sampler against definitions written out longhand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from workers.text.sampler import History, RowSampling, edit_logits, logprobs, sample, sample_each

NOTHING = History((), Counter())


def draws(logits: torch.Tensor, n: int = 400, **rules: float) -> Counter[int]:
    row = RowSampling(seed=7, **rules)  # type: ignore[arg-type]
    return Counter(sample(logits.clone()[None], [row], [NOTHING])[0] or 0 for _ in range(n))


def test_temperature_zero_takes_the_likeliest_for_each_row_at_once() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    greedy = RowSampling(temperature=0.0)
    assert sample(logits, [greedy, greedy], [NOTHING, NOTHING]) == [1, 0]


def test_the_same_seed_draws_the_same_tokens_in_any_company() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 500)
    alone, crowd = RowSampling(seed=11), RowSampling(seed=11)
    other = RowSampling(seed=5, temperature=1.7)
    first = [sample(logits.clone(), [alone], [NOTHING])[0] for _ in range(20)]
    second = [sample(logits.expand(2, -1).clone(), [other, crowd], [NOTHING] * 2)[1] for _ in range(20)]
    assert first == second
    assert len(set(first)) > 5


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    counts = draws(logits, n=3000)
    for token, probability in enumerate((0.5, 0.3, 0.2)):
        assert counts[token] / 3000 == pytest.approx(probability, abs=0.04)


def test_top_k_keeps_k_tokens() -> None:
    assert set(draws(torch.tensor([4.0, 3.9, 3.8, 3.7]), top_k=2)) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert set(draws(logits, top_p=0.7)) == {0, 1}
    assert set(draws(logits, top_p=0.01)) == {0}


def test_top_p_over_a_flat_vocabulary_larger_than_the_shortlist_is_exact() -> None:
    counts = draws(torch.zeros(2000), n=3000, top_p=0.9)
    assert len(counts) > 1200
    assert len(counts) <= 1801


def test_min_p_keeps_tokens_near_the_best() -> None:
    logits = torch.log(torch.tensor([0.6, 0.25, 0.1, 0.05]))
    assert set(draws(logits, min_p=0.3)) == {0, 1}


def test_penalties_use_their_own_formulas() -> None:
    row = torch.tensor([2.0, -2.0, 1.0, 1.0])
    history = History([0], Counter({1: 3, 2: 1}))
    rules = RowSampling(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 5.0})
    edit_logits(row, rules, history)
    assert row.tolist() == pytest.approx([2.0 / 2, -2.0 * 2 - 3 * 0.5 - 0.25, 1.0 / 2 - 0.5 - 0.25, 1.0 + 5.0])


def test_a_bias_for_an_id_outside_the_vocabulary_changes_nothing() -> None:
    row = torch.zeros(3)
    edit_logits(row, RowSampling(logit_bias={99: 5.0}), NOTHING)
    assert row.tolist() == [0.0, 0.0, 0.0]


def test_a_row_of_nan_fails_alone() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [1.0, 0.0]])
    rules = [RowSampling(temperature=0.0), RowSampling(), RowSampling(temperature=0.0)]
    assert sample(logits, rules, [NOTHING] * 3) == [1, None, 0]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = torch.tensor([1.0, 2.0, 3.0])
    value, top = logprobs(row, 0, 2)
    expected = torch.log_softmax(row, -1)
    assert value == pytest.approx(float(expected[0]))
    assert [i for i, _ in top] == [2, 1]
    assert top[0][1] == pytest.approx(float(expected[2]))


def test_a_mask_leaves_only_what_is_allowed_greedy_or_drawn() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    allowed = torch.tensor([False, True, True])
    rules = [RowSampling(temperature=0.0), RowSampling(temperature=2.0, seed=3)]
    for _ in range(30):
        first, second = sample(logits.clone(), rules, [NOTHING] * 2, [allowed, allowed])
        assert first == 1
        assert second in (1, 2)


def test_a_masked_row_of_nan_fails_alone() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [1.0, 0.0]])
    greedy = [RowSampling(temperature=0.0)] * 2
    allowed = torch.tensor([False, True])
    assert sample(logits, greedy, [NOTHING] * 2, [allowed, None]) == [None, 0]


def test_a_row_that_raises_fails_alone() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    greedy = [RowSampling(temperature=0.0)] * 2
    wrong_size = torch.ones(5, dtype=torch.bool)
    assert sample_each(logits, greedy, [NOTHING] * 2, [wrong_size, None]) == [None, 0]

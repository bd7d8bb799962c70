"""Tokens chosen on a device are those that the host chooses, by every rule; here the device is the CPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from workers.text.gpu import sampling as module
from workers.text.gpu.sampling import sample_there
from workers.text.sampler import History, RowSampling, sample

VOCABULARY = 3000
RULES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.05},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 40, "temperature": 1.5},
    {"top_k": 2000},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 2.0},
    {"top_p": 0.0001},
    {"min_p": 0.1},
    {"min_p": 0.00001, "temperature": 3.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"repetition_penalty": 1.3, "top_p": 0.95},
    {"logit_bias": {3: 9.0, 5: -100.0}},
    {"logit_bias": {7: 100.0}, "temperature": 0.0},
)


def rows(num: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn((num, VOCABULARY), generator=torch.Generator().manual_seed(seed)) * spread


def both(
    logits: torch.Tensor, wanted: Sequence[dict[str, Any]], masks: Sequence[torch.Tensor | None]
) -> tuple[list[int | None], list[int | None]]:
    history = History([1, 2, 3], Counter({3: 2, 9: 1}))
    there, here = ([RowSampling(**fields, seed=n) for n, fields in enumerate(wanted)] for _ in range(2))
    histories = [history] * len(wanted)
    got = sample_there(logits, there, histories, masks), sample(logits, here, histories, masks)
    for one, other, token in zip(there, here, got[0], strict=True):
        if token is not None and not one.greedy:
            assert one.draw() == other.draw(), "as many numbers were drawn"
    return got


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
def test_every_rule_alone_and_in_company_gives_what_the_host_gives(seed: int, spread: float) -> None:
    logits = rows(len(RULES), seed, spread)
    before = logits.clone()
    even = torch.arange(VOCABULARY) % 2 == 0
    masks = [even if n % 5 == 2 else None for n in range(len(RULES))]
    there, here = both(logits, RULES, masks)
    assert there == here
    assert torch.equal(logits, before)
    for n, fields in enumerate(RULES):
        alone = sample_there(
            logits[n : n + 1],
            [RowSampling(**fields, seed=n)],
            [History([1, 2, 3], Counter({3: 2, 9: 1}))],
            masks[n : n + 1],
        )
        assert alone == there[n : n + 1], fields
    assert all(token is not None and token % 2 == 0 for n, token in enumerate(there) if n % 5 == 2)


def test_what_the_candidates_do_not_hold_is_drawn_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    drawn = module.draw_from

    def draw_from(row: torch.Tensor, peak: float, rules: RowSampling, uniform: float) -> int:
        asked.append(rules.top_p)
        return drawn(row, peak, rules, uniform)

    monkeypatch.setattr(module, "draw_from", draw_from)
    # Nearly equal, but no two of them are: equal ones may be taken in any order.
    steps = [torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(n)) for n in range(64)]
    flat = torch.stack(steps) * 1e-5
    wanted = [{"top_p": 0.9} if n % 2 else {"top_p": 0.2} for n in range(64)]
    there, here = both(flat, wanted, [None] * 64)
    assert there == here
    assert asked == [0.9] * 32, "2,700 of 3,000 equal tokens have to be kept, 600 of them do not"


def test_a_row_without_a_valid_token_fails_alone() -> None:
    logits = rows(4, 0)
    logits[0, 17], logits[1, :], logits[2, 5] = math.nan, -math.inf, math.inf
    for fields in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5}):
        there, here = both(logits, [fields] * 4, [None] * 4)
        assert there[:3] == here[:3] == [None] * 3
        assert there[3] == here[3] is not None


def test_draws_are_as_likely_as_the_logits_say() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None].expand(4096, -1).contiguous()
    histories = [History([], Counter())] * 4096
    for fields, shares in (
        ({}, (0.5, 0.25, 0.125, 0.125)),
        ({"top_k": 2}, (2 / 3, 1 / 3, 0, 0)),
        ({"min_p": 0.4}, (2 / 3, 1 / 3, 0, 0)),
    ):
        rules = [RowSampling(**fields, seed=n) for n in range(4096)]
        counts = Counter(sample_there(logits, rules, histories, [None] * 4096))
        for token, share in enumerate(shares):
            assert abs(counts[token] / 4096 - share) < 4.5 * math.sqrt(0.25 / 4096), (fields, counts)


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 1023, 1025])
def test_vocabularies_of_any_size(size: int) -> None:
    logits = torch.randn((32, size), generator=torch.Generator().manual_seed(size))
    wanted = [({}, {"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.2})[n % 4] for n in range(32)]
    there, here = both(logits, wanted, [None] * 32)
    assert there == here

"""Sizes and time spans as every room tells them."""

from __future__ import annotations

import pytest
from hostler.words import duration, size, stage


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0"),
        (None, "0"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (99.96 * 2**20, "100 MiB"),
        (2**30 - 1, "1.0 GiB"),
        (512 * 2**30, "512 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_a_size_has_the_unit_that_people_would_choose(num_bytes: float | None, words: str) -> None:
    assert size(num_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (0, "0 s"),
        (0.04, "0 s"),
        (0.3, "0.3 s"),
        (1.2, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3599, "1 h"),
        (7500, "2 h 5 min"),
        (86_399, "1 d"),
        (3 * 86_400, "3 d"),
    ],
)
def test_a_time_span_has_one_unit_or_two_and_never_sixty_of_one(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_stage_that_nobody_knows_keeps_its_name() -> None:
    assert (stage("wake"), stage("polish")) == ("waking up", "polish")

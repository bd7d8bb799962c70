"""Rounds as a run would find them, for the tests of what is made of them. Above: the tests. Below: `tests.bench`."""

from __future__ import annotations

from tests.bench.load import Level
from tests.bench.results import Round


def level(streams: int, **changed: float) -> Level:
    """Return one level's numbers, those that a test cares about changed."""
    figures: dict[str, float] = {
        "ttft_p50_s": 0.1,
        "ttft_p95_s": 0.2,
        "inter_token_p50_s": 0.02,
        "max_gap_s": 0.05,
        "tokens_per_s": 50.0,
        "num_tokens": 128,
        "num_prompt_tokens": 90,
        "is_counted_by_server": True,
        "failed": 0,
        "client_cpu_share": 0.01,
        "memory_bytes": 2**30,
        **changed,
    }
    return Level(streams=streams, **figures)  # type: ignore[arg-type]


def one_round(peer: str, number: int = 0, start_s: float = 5.0, *levels: Level) -> Round:
    """Return a round with one stream's default level unless levels are given."""
    return Round(peer, number, start_s, levels or (level(1),))

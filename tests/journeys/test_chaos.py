"""`make chaos`, short: processes die and freeze under load; no reply is wrong, none hangs, everything comes back."""

from __future__ import annotations

import pytest

from tests.chaos.clients import SEED, Wish, judge_stream
from tests.chaos.run import chaos
from workers.scripted import expected_reply

WISH = Wish("one", "r", "hello", 3, stream=True, leaves_after=0)


def chunk(text: str, finish: str = "") -> str:
    return f'{{"choices": [{{"delta": {{"content": "{text}"}}, "finish_reason": "{finish}"}}]}}'


WHOLE = expected_reply("hello", SEED, "r", 3)
ERROR = '{"error": {"message": "gone", "type": "server_error", "param": null, "code": "worker_lost"}}'


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ([chunk(WHOLE), chunk("", "stop"), "[DONE]"], "served"),
        ([chunk(WHOLE[:4]), ERROR], "cut off with an error"),
        ([chunk(WHOLE[:4])], "ended without a word"),
        ([chunk(WHOLE[:4]), ERROR, "[DONE]"], "done after an error"),
        ([chunk(WHOLE[1:]), chunk("", "stop"), "[DONE]"], "wrong text"),
        ([chunk(WHOLE), chunk(WHOLE, "stop"), "[DONE]"], "wrong text"),
        ([chunk(WHOLE[:4]), chunk("", "stop"), "[DONE]"], "called whole"),
    ],
)
def test_a_stream_that_lost_doubled_or_crossed_something_is_told_from_a_good_one(
    lines: list[str], verdict: str
) -> None:
    assert judge_stream(WISH, lines).startswith(verdict)


@pytest.mark.journey
@pytest.mark.timeout(400)
def test_whoever_is_killed_or_frozen_no_reply_is_wrong_none_hangs_and_everything_comes_back() -> None:
    outcome = chaos(num_requests=100, seed=3, num_clients=6, every_s=(3.0, 6.0))
    assert not outcome.faults, "\n".join(outcome.faults)
    assert sum(outcome.struck.counts.values()) >= 3
    assert outcome.verdicts.ends["served"] > 20

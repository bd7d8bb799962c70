"""What averages hide, measured on hostler alone: a long prompt among running streams, and a chat's second turn.

Above: the run (`__main__`). Below: `client`. Each gives one ratio of two times seen within the same few seconds, so
that it says something about the scheduler and the cache and little about the machine.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence

from .client import StreamResult, stream_chat
from .load import STREAM_WITHIN_S, prompt
from .peers import Peer, Running
from .results import ScenarioResult, show_s

STREAMS = 8
STREAM_TOKENS = 256
LONG_PROMPT_TOKENS = 1500
CHAT_TOKENS = 1000
CHAT_REPLY_TOKENS = 32
CHATS = 3
GAP_AT_MOST = 3.0
SECOND_TURN_AT_MOST = 0.25
_TOKENS_PER_SENTENCE = 30
_CHUNKS_BEFORE = 8


class ScenarioFailed(RuntimeError):
    """A scenario gave no figure; the message says why."""


def long_text(num_tokens: int, number: int) -> str:
    """Return about `num_tokens` tokens of text that no other `number` begins alike."""
    sentences = [
        f"Entry {number}-{index}: the keeper noted wind, cloud, ships and the hour of lamp number {index * 7 % 89}."
        for index in range(max(1, num_tokens // _TOKENS_PER_SENTENCE))
    ]
    return f"Log {number}. " + " ".join(sentences) + " Now say what the log is about."


def gaps_s(results: Sequence[StreamResult], since_s: float, until_s: float) -> list[float]:
    """Return the silences between events of all streams that overlap the time from `since_s` to `until_s`."""
    return [
        b - a
        for result in results
        for a, b in zip(result.arrivals_s, result.arrivals_s[1:], strict=False)
        if b >= since_s and a <= until_s
    ]


def judge_gaps(streams: Sequence[StreamResult], long: StreamResult) -> ScenarioResult:
    """Compare the longest gap while the long prompt was taken in with the streams' median gap before it came.

    Raises:
        ScenarioFailed: a stream failed, or too few gaps were seen.
    """
    if errors := [result.error for result in (*streams, long) if result.error]:
        raise ScenarioFailed(f"a stream failed: {errors[0]}")
    began_s = max(result.arrivals_s[0] for result in streams)
    before = gaps_s(streams, began_s, long.began_s)
    during = gaps_s(streams, long.began_s, long.arrivals_s[0])
    if not before or not during:
        raise ScenarioFailed("the streams did not run beside the long prompt")
    median_s, longest_s = statistics.median(before), max(during)
    return ScenarioResult(
        "long_prompt",
        f"{long.num_prompt_tokens:,}-token prompt among {len(streams)} streams: their longest gap / median gap",
        longest_s / median_s,
        GAP_AT_MOST,
        f"{show_s(longest_s)} / {show_s(median_s)}; the long prompt's first token after {show_s(long.ttft_s)}",
    )


def judge_turns(pairs: Sequence[tuple[StreamResult, StreamResult]]) -> ScenarioResult:
    """Compare the second turn's time to first token with the first's: the median over chats.

    Raises:
        ScenarioFailed: a turn failed.
    """
    if errors := [turn.error for pair in pairs for turn in pair if turn.error]:
        raise ScenarioFailed(f"a turn failed: {errors[0]}")
    first_s = statistics.median(first.ttft_s for first, _ in pairs)
    second_s = statistics.median(second.ttft_s for _, second in pairs)
    return ScenarioResult(
        "second_turn",
        f"second turn of a {pairs[0][0].num_prompt_tokens:,}-token chat: first token / first token of turn 1",
        statistics.median(second.ttft_s / first.ttft_s for first, second in pairs),
        SECOND_TURN_AT_MOST,
        f"{show_s(second_s)} / {show_s(first_s)}, {len(pairs)} chats",
    )


async def long_prompt_among_streams(peer: Peer, running: Running, first_prompt: int) -> ScenarioResult:
    """Let 8 streams run, then send a long prompt beside them.

    Raises:
        ScenarioFailed: no figure.
    """
    under_way = [asyncio.Event() for _ in range(STREAMS)]
    chunks = [0] * STREAMS

    def counter(index: int) -> Callable[[], None]:
        def count() -> None:
            chunks[index] += 1
            if chunks[index] >= _CHUNKS_BEFORE:
                under_way[index].set()

        return count

    async def stream(index: int) -> StreamResult:
        body = peer.body(prompt(first_prompt + index), STREAM_TOKENS)
        try:
            return await stream_chat(running.url, body, STREAM_WITHIN_S, counter(index))
        finally:
            under_way[index].set()  # a stream that failed must not hold up the rest

    async def long() -> StreamResult:
        await asyncio.gather(*(event.wait() for event in under_way))
        body = peer.body(long_text(LONG_PROMPT_TOKENS, first_prompt), 4)
        return await stream_chat(running.url, body, STREAM_WITHIN_S)

    *streams, late = await asyncio.gather(*(stream(index) for index in range(STREAMS)), long())
    return judge_gaps(streams, late)


async def second_turns(peer: Peer, running: Running, first_prompt: int) -> ScenarioResult:
    """Hold a few chats of two turns, one after another.

    Raises:
        ScenarioFailed: no figure.
    """
    pairs = []
    for chat in range(CHATS):
        body = peer.body(long_text(CHAT_TOKENS, first_prompt + chat), CHAT_REPLY_TOKENS)
        first = await stream_chat(running.url, body, STREAM_WITHIN_S)
        reply = [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Say more about the lamp."}]
        second = await stream_chat(running.url, {**body, "messages": [*body["messages"], *reply]}, STREAM_WITHIN_S)
        pairs.append((first, second))
    return judge_turns(pairs)


async def run_scenarios(peer: Peer, running: Running, first_prompt: int) -> tuple[list[ScenarioResult], list[str]]:
    """Run every scenario; return the results, and the reasons why some gave none."""
    results, problems = [], []
    for scenario in (long_prompt_among_streams, second_turns):
        try:
            results.append(await scenario(peer, running, first_prompt))
        except ScenarioFailed as error:
            problems.append(f"{peer.name}, {scenario.__name__}: {error}")
    return results, problems

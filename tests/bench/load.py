"""The load: c streams at once, each with a prompt of its own, and what was seen of them as numbers.

Above: the run (`__main__`). Below: `client`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

from .client import StreamResult, stream_chat
from .peers import Peer, Running, Skip, memory_bytes

NEW_TOKENS = 128
STREAM_WITHIN_S = 240.0
_RETRY_EVERY_S = 0.05

_SUBJECTS = (
    "a lighthouse keeper", "the first railway", "a river in spring", "an old violin", "the night market",
    "a mountain village", "the harbour crane", "a desert caravan", "the winter orchard", "a glass factory",
    "the moon's far side", "a beekeeper's year", "the printing press", "a coral reef", "the clock tower",
    "a bread oven", "the weather station", "a chess school", "the ferry crossing", "a library fire",
)  # fmt: skip
_ASK = (
    "Write a long and detailed piece about {subject}, number {number}. Begin with how it came to be, then describe the "
    "people around it and what they did from morning to evening. Name the sounds and the colours. Do not stop early."
)  # fmt: skip


def prompt(number: int) -> str:
    """Return a prompt of about 90 tokens with the chat template; no two numbers give the same one."""
    return f"{number}: " + _ASK.format(subject=_SUBJECTS[number % len(_SUBJECTS)], number=number)


@dataclass(frozen=True, slots=True)
class Level:
    """What was measured with `streams` at once; seconds and bytes."""

    streams: int
    ttft_p50_s: float
    ttft_p95_s: float
    inter_token_p50_s: float
    max_gap_s: float
    tokens_per_s: float
    num_tokens: int
    num_prompt_tokens: float
    is_counted_by_server: bool
    failed: int
    client_cpu_share: float
    memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarize(results: Sequence[StreamResult], client_cpu_share: float, resident: int) -> Level:
    """Turn the streams of one level into numbers. Raises ValueError when none succeeded."""
    good = [r for r in results if not r.error]
    if not good:
        raise ValueError(f"all {len(results)} streams failed; the first: {results[0].error}")
    spent_s = max(r.ended_s for r in good) - min(r.began_s for r in good)
    return Level(
        streams=len(results),
        ttft_p50_s=statistics.median(r.ttft_s for r in good),
        ttft_p95_s=percentile([r.ttft_s for r in good], 0.95),
        inter_token_p50_s=statistics.median(r.inter_token_s for r in good),
        max_gap_s=max(r.max_gap_s for r in good),
        tokens_per_s=sum(r.num_tokens for r in good) / spent_s,
        num_tokens=sum(r.num_tokens for r in good),
        num_prompt_tokens=statistics.mean(r.num_prompt_tokens for r in good),
        is_counted_by_server=all(r.is_counted_by_server for r in good),
        failed=len(results) - len(good),
        client_cpu_share=client_cpu_share,
        memory_bytes=resident,
    )


async def measure(peer: Peer, running: Running, streams: int, first_prompt: int, new_tokens: int = NEW_TOKENS) -> Level:
    """Send `streams` requests at once and wait for all."""
    bodies = [peer.body(prompt(first_prompt + i), new_tokens) for i in range(streams)]
    began_s, cpu_s = time.perf_counter(), time.process_time()
    results = await asyncio.gather(*(stream_chat(running.url, body, STREAM_WITHIN_S) for body in bodies))
    share = (time.process_time() - cpu_s) / (time.perf_counter() - began_s)
    return summarize(results, share, memory_bytes(running.processes()))


def first_start_s(peer: Peer) -> float:
    """Start a peer, wait for its first text and stop it; return the seconds that this took.

    Raises:
        Skip: it does not start.
    """
    began_s = time.perf_counter()
    running = peer.start()
    try:
        return uvloop.run(first_reply(peer, running, began_s))
    except RuntimeError as error:
        raise Skip(f"it does not start on this machine: {last_words(str(error))}") from None
    finally:
        running.stop()


def last_words(output: str) -> str:
    """Return the line of a server's output that most likely says why it ended: its last error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "Illegal instruction" in line]
    return (errors or lines or ["it printed nothing"])[-1][-300:]


async def first_reply(peer: Peer, running: Running, started_s: float) -> float:
    """Ask for a reply until there is one; return the seconds from `started_s` to its first text.

    Raises:
        RuntimeError: the server ended, or gave no reply in time; the message holds its output.
    """
    body = peer.body("Say hello.", 4)
    error = "nothing was tried"
    while (left_s := peer.start_within_s - (time.perf_counter() - started_s)) > 0:
        result = await stream_chat(running.url, body, left_s)
        if not result.error:
            return result.arrivals_s[0] - started_s
        error = result.error
        if running.has_ended:
            break
        await asyncio.sleep(_RETRY_EVERY_S)
    raise RuntimeError(f"{peer.name} gave no first reply ({error}). Its output:\n{running.output()}")

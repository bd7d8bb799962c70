"""Clients that know what each byte of a reply must be, and what else they may see while processes die.

Above: `run`. Below: HTTP. The scripted engine's reply is a function of prompt, seed and request id, so a reply that was
lost in part, doubled or crossed with another's shows.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from workers.scripted import expected_reply

HUNG_AFTER_S = 90.0
SEED = 7


@dataclass
class Verdicts:
    """What became of every request.

    Attributes:
        ends: how many ended in each way.
        faults: requests that ended in a way that none may.
        resets_s: when connections broke off; only the death of a gateway may do that.
        waits_s: from a request to its first byte, of those that were served.
    """

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    resets_s: list[tuple[float, float]] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wish:
    """One request: what is asked, and whether the client stays to the end."""

    model: str
    request_id: str
    prompt: str
    num_tokens: int
    stream: bool
    leaves_after: int

    @property
    def expected(self) -> str:
        """The whole reply."""
        return expected_reply(self.prompt, SEED, self.request_id, self.num_tokens)


def wish(chance: random.Random, models: Sequence[str], number: int) -> Wish:
    """Return a random request; the first models are asked for most."""
    model = chance.choices(models, [1 / (rank + 1) for rank in range(len(models))])[0]
    num_tokens, delay_ms = chance.choice((1, 8, 20, 60)), chance.choice((0, 2, 10, 30))
    prompt = f"[[tokens={num_tokens}]] [[delay_ms={delay_ms}]] number {number}"
    leaves_after = chance.randrange(num_tokens) + 1 if chance.random() < 0.1 else 0
    return Wish(model, f"chaos-{number}", prompt, num_tokens, chance.random() < 0.75, leaves_after)


def judge_stream(wished: Wish, lines: Sequence[str]) -> str:
    """Return how a whole stream of `data:` lines ended: "served", "cut off with an error", or what is wrong with it."""
    text, error, finish = "", "", ""
    for line in lines:
        if line == "[DONE]":
            continue
        event = json.loads(line)
        if "error" in event:
            error = event["error"]["code"] or event["error"]["type"]
            continue
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    done = lines[-1:] == ["[DONE]"]
    if not wished.expected.startswith(text):
        return f"wrong text {text!r}"
    if error:
        return "done after an error" if done else "cut off with an error"
    if not done:
        return "ended without a word"
    return "served" if text == wished.expected and finish == "stop" else f"called whole, but is {text!r} {finish!r}"


_FINE = ("served", "cut off with an error", "refused", "left")


async def ask(client: httpx.AsyncClient, wished: Wish, verdicts: Verdicts) -> str:
    """Send one request; judge and return how it ended."""
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(HUNG_AFTER_S):
            end = await _ask(client, wished, verdicts, began_s)
    except TimeoutError:
        end = f"hung for {HUNG_AFTER_S:g} s"
    except httpx.HTTPError:
        end = "reset"
        verdicts.resets_s.append((began_s, time.monotonic()))
    except (ValueError, KeyError, TypeError) as error:
        end = f"unreadable: {type(error).__name__}: {error}"
    verdicts.ends[end if end in (*_FINE, "reset") else "wrong"] += 1
    if end not in (*_FINE, "reset"):
        verdicts.faults.append(f"{wished.request_id} of {wished.model}: {end}")
    return end


async def _ask(client: httpx.AsyncClient, wished: Wish, verdicts: Verdicts, began_s: float) -> str:
    body = {
        "model": wished.model,
        "messages": [{"role": "user", "content": wished.prompt}],
        "seed": SEED,
        "stream": wished.stream,
    }
    headers = {"x-request-id": wished.request_id}
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        if response.status_code != 200:
            return _judge_refusal(response, json.loads(await response.aread()))
        if not wished.stream:
            document = json.loads(await response.aread())
            verdicts.waits_s.append(time.monotonic() - began_s)
            text = document["choices"][0]["message"]["content"]
            return "served" if text == wished.expected else f"wrong text {text!r}"
        lines: list[str] = []
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                if not lines:
                    verdicts.waits_s.append(time.monotonic() - began_s)
                lines.append(line.removeprefix("data: "))
                if len(lines) == wished.leaves_after:
                    return "left"
        return judge_stream(wished, lines)


def _judge_refusal(response: httpx.Response, document: dict[str, dict[str, object]]) -> str:
    if set(document["error"]) != {"message", "type", "param", "code"}:
        return f"an error of another shape: {document}"
    if response.status_code not in (429, 500, 502, 503, 504):
        return f"HTTP {response.status_code}: {document['error']['message']}"
    if response.status_code in (429, 503) and "retry-after" not in response.headers:
        return f"HTTP {response.status_code} without Retry-After: {document['error']['code']}"
    return "refused"

"""Processes are killed and frozen under a running server; what clients then see is checked byte for byte.

The scripted engine's replies are a function of the request, so every reply must be exact, an exact prefix and an
error, or an error.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.journeys.server import Server, Servers, wait_until
from workers.scripted import expected_reply

pytestmark = [pytest.mark.journey, pytest.mark.timeout(200)]

TWO_MODELS = """\
models:
  - {name: one, engine: scripted, preload: true, max_running: 4}
  - {name: two, engine: scripted, preload: true}
gateways: 2
"""


@dataclass
class Reply:
    """What a streaming client saw."""

    text: str = ""
    error: dict[str, object] | None = None
    done: bool = False
    ended_s: float = 0.0


async def stream(server: Server, model: str, prompt: str, started: Callable[[], None] = lambda: None) -> Reply:
    reply = Reply()
    body = {"model": model, "stream": True, "seed": 1, "messages": [{"role": "user", "content": prompt}]}
    headers = {"x-request-id": "same-for-everybody"}
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                reply.done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    reply.error = event["error"]
                else:
                    reply.text += event["choices"][0]["delta"].get("content") or ""
                    if reply.text:
                        started()
    reply.ended_s = time.monotonic()
    return reply


async def started_stream(server: Server, model: str, prompt: str) -> asyncio.Task[Reply]:
    begun = asyncio.Event()
    task = asyncio.create_task(stream(server, model, prompt, begun.set))
    await asyncio.wait({asyncio.ensure_future(begun.wait()), task}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
    assert begun.is_set(), task
    return task


def ask(server: Server, model: str, prompt: str) -> httpx.Response:
    body = {"model": model, "seed": 1, "messages": [{"role": "user", "content": prompt}]}
    headers = {"x-request-id": "same-for-everybody"}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def expected(prompt: str, tokens: int) -> str:
    return expected_reply(prompt, 1, "same-for-everybody", tokens)


def worker_pid(server: Server, model: str) -> int:
    return int(replica(server, model)["pid"])


def replica(server: Server, model: str) -> dict[str, Any]:
    status = json.loads(server.hostler("ps", "--json", "--port", str(server.port)).stdout)
    return next(r for r in status["replicas"] if r["model"] == model)


def running(server: Server, model: str) -> int:
    now = replica(server, model)
    return int(now["num_running"]) + int(now["num_queued"])


@pytest.fixture(scope="module")
def server(module_servers: Servers) -> Server:
    started = module_servers(config=TWO_MODELS)
    wait_until(lambda: started.is_ready("one") and started.is_ready("two"), 60, "both models")
    return started


@pytest.fixture(autouse=True)
async def everything_is_up_again(server: Server) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(
        wait_until, lambda: server.is_ready("one") and server.is_ready("two"), 60, "both models again"
    )


LONG = "[[tokens=400]] [[delay_ms=10]] tell me"


def test_gateway_orchestrator_and_workers_are_processes_of_their_own(server: Server) -> None:
    gateways, orchestrators = server.pids("-m", "gateway"), server.pids("-m", "orchestrator", "--run-dir")
    workers = {worker_pid(server, "one"), worker_pid(server, "two")}
    assert len(gateways) == 2
    assert len(workers) == 2
    assert orchestrators
    assert not workers & {*gateways, *orchestrators}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_dies_or_freezes_ends_its_streams_and_no_others(
    server: Server, how: signal.Signals
) -> None:
    victim, bystander = await asyncio.gather(started_stream(server, "one", LONG), started_stream(server, "two", LONG))
    pid = await asyncio.to_thread(worker_pid, server, "one")
    struck = time.monotonic()
    os.kill(pid, how)
    lost = await victim
    assert lost.error is not None
    assert not lost.done
    assert lost.error["code"] == "worker_lost"
    assert expected(LONG, 400).startswith(lost.text)
    assert lost.ended_s - struck < 3.0
    again = await asyncio.to_thread(ask, server, "one", "hello")
    assert again.json()["choices"][0]["message"]["content"] == expected("hello", 16)
    assert await asyncio.to_thread(worker_pid, server, "one") != pid
    kept = await bystander
    assert kept.done
    assert kept.text == expected(LONG, 400)


async def test_killing_the_orchestrator_leaves_streams_and_workers_alone(server: Server) -> None:
    task = await started_stream(server, "one", LONG)
    before = {m: worker_pid(server, m) for m in ("one", "two")}
    orchestrator = [p for p in server.pids("-m", "orchestrator", "--run-dir") if p not in server.pids("ray_head")]
    for pid in orchestrator:
        os.kill(pid, signal.SIGKILL)
    assert (await asyncio.to_thread(ask, server, "two", "still here?")).status_code == 200
    reply = await task
    assert reply.done
    assert reply.text == expected(LONG, 400)

    def back() -> bool:
        try:
            return {m: worker_pid(server, m) for m in ("one", "two")} == before
        except (ValueError, StopIteration, KeyError):
            return False

    await asyncio.to_thread(wait_until, back, 15, "the same workers adopted")


async def test_a_killed_gateway_is_back_and_its_slots_are_freed(server: Server) -> None:
    tasks = [await started_stream(server, "one", "[[tokens=3000]] [[delay_ms=10]]") for _ in range(2)]
    for pid in server.pids("-m", "gateway"):
        os.kill(pid, signal.SIGKILL)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, httpx.HTTPError) for r in results), results
    await asyncio.to_thread(wait_until, lambda: ask(server, "two", "hi").status_code == 200, 5, "a gateway again")
    await asyncio.to_thread(wait_until, lambda: running(server, "one") == 0, 5, "slots freed")


@pytest.mark.parametrize("manner", ["streaming", "waiting for the whole reply", "queued"])
async def test_a_client_that_leaves_frees_its_slot(server: Server, manner: str) -> None:
    prompt = "[[tokens=5000]] [[delay_ms=10]]"
    fillers = [await started_stream(server, "one", prompt) for _ in range(4 if manner == "queued" else 0)]
    if manner == "streaming":
        leaver: asyncio.Task[object] = await started_stream(server, "one", prompt)  # type: ignore[assignment]
    else:

        async def whole() -> httpx.Response:
            body = {"model": "one", "messages": [{"role": "user", "content": prompt}]}
            async with httpx.AsyncClient(timeout=60) as client:
                return await client.post(f"{server.url}/v1/chat/completions", json=body)

        leaver = asyncio.create_task(whole())
    count = len(fillers) + 1
    await asyncio.to_thread(wait_until, lambda: running(server, "one") == count, 10, "the request runs")
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    # `hostler ps` itself takes a few hundred milliseconds to start: the first look must already show it gone.
    await asyncio.sleep(0.2)
    assert running(server, "one") == count - 1
    for filler in fillers:
        filler.cancel()
    await asyncio.gather(*fillers, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: running(server, "one") == 0, 5, "slots freed")


async def test_bad_input_is_refused_while_streams_go_on(server: Server) -> None:
    def chat(**fields: object) -> bytes:
        return json.dumps({"model": "two", "messages": [{"role": "user", "content": "x"}], **fields}).encode()

    bad: list[bytes] = [
        b"{",
        b'{"model": NaN}',
        b'{"model":"two","messages":[{"role":"user","content":"\\ud800"}]}',
        b"[" * 100_000,
        b"x" * 100_000_000,
        chat(messages=[]),
        json.dumps({"model": "two"}).encode(),
        chat(model="nobody"),
        chat(max_tokens=-5),
        chat(temperature=1e9),
        chat(messages=[{"role": "wizard", "content": "x"}]),
        chat(messages=[{"role": "user", "content": "word " * 800_000}]),
    ]
    streams = [await started_stream(server, "two", f"[[tokens=300]] [[delay_ms=10]] {i}") for i in range(8)]
    async with httpx.AsyncClient(timeout=60) as client:
        for body in bad:
            try:
                response = await client.post(
                    f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
                )
            except httpx.WriteError:
                continue  # refused before it was all sent
            assert 400 <= response.status_code < 500, (body[:60], response.text[:300])
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for index, reply in enumerate(await asyncio.gather(*streams)):
        assert reply.text == expected(f"[[tokens=300]] [[delay_ms=10]] {index}", 300)
        assert reply.done

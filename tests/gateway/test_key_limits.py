"""How much a key may ask for: at the door, over several gateways, and after one of them has died."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hostler.inference.v1 import inference_pb2 as pb
from hostler.keys import Key, KeyFile

from gateway.errors import RateLimited
from gateway.keys.limits import MAX_DEBT_S, KeyLimits
from tests.gateway.fakes import MODEL, finish, text, world

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def key_with(**limits: Any) -> Key:
    return Key(id="0000002a", name="ci", digest="0" * 64, created_at=0.0, **limits)


def admitted(limits: KeyLimits, key: Key, tries: int) -> int:
    number = 0
    for _ in range(tries):
        try:
            limits.enter(key)
        except RateLimited:
            continue
        limits.leave(key)
        number += 1
    return number


def test_a_minutes_requests_are_admitted_and_come_back_evenly(tmp_path: Path) -> None:
    clock, key = Clock(), key_with(requests_per_minute=6)
    limits = KeyLimits(tmp_path / "limits", clock)
    assert admitted(limits, key, 20) == 6
    with pytest.raises(RateLimited) as refused:
        limits.enter(key)
    assert refused.value.retry_after_s == pytest.approx(10.0)
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now_s += 10
    assert admitted(limits, key, 20) == 1
    clock.now_s += 3600
    assert admitted(limits, key, 20) == 6
    limits.close()


def test_tokens_are_owed_once_a_reply_cost_more_than_was_left_but_never_for_ever(tmp_path: Path) -> None:
    clock, key = Clock(), key_with(tokens_per_minute=60)
    limits = KeyLimits(tmp_path / "limits", clock)
    assert limits.enter(key)["x-ratelimit-remaining-tokens"] == "60"
    limits.charge(key, 90)
    with pytest.raises(RateLimited) as refused:
        limits.enter(key)
    assert refused.value.retry_after_s == pytest.approx(31.0)
    clock.now_s += 31
    limits.enter(key)
    limits.charge(key, 10**9)
    clock.now_s += MAX_DEBT_S
    limits.enter(key)
    limits.close()


def test_gateways_count_together(tmp_path: Path) -> None:
    clock, key = Clock(), key_with(requests_per_minute=6, max_streams=2)
    one, two = (KeyLimits(tmp_path / "limits", clock) for _ in range(2))
    one.enter(key)
    two.enter(key)
    with pytest.raises(RateLimited, match="2 requests at a time"):
        one.enter(key)
    two.leave(key)
    one.enter(key)
    one.leave(key)
    assert admitted(one, key, 10) + admitted(two, key, 10) == 3
    one.close()
    two.close()


HOLDS = """
import sys, time
from pathlib import Path
from gateway.keys.limits import KeyLimits
from hostler.keys import Key
limits = KeyLimits(Path(sys.argv[1]))
limits.enter(Key.model_validate_json(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_gateway_that_is_killed_leaves_no_place_taken(tmp_path: Path) -> None:
    key = key_with(max_streams=1)
    limits = KeyLimits(tmp_path / "limits")
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "limits"), key.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=":".join(sys.path))) as dead:
        assert dead.stdout is not None
        assert dead.stdout.readline() == b"held\n"
        with pytest.raises(RateLimited):
            limits.enter(key)
        dead.send_signal(signal.SIGKILL)
    limits.enter(key)
    limits.close()


def test_a_gateway_that_is_frozen_with_the_lock_stops_nobody(tmp_path: Path) -> None:
    key = key_with(requests_per_minute=6)
    one, two = (KeyLimits(tmp_path / "limits") for _ in range(2))
    with one._locked():
        two.enter(key)
    one.close()
    two.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_the_door_says_429_in_the_callers_dialect_and_when_to_come_back(tmp_path: Path, path: str) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, key = file.add("ci", requests_per_minute=1)
    async with world(over_tcp=False, config={"keys_file": file.path, "require_key": True}) as here:
        headers = {"Authorization": f"Bearer {key}"}
        first = await here.client.post(path, json={**BODY, "max_tokens": 5}, headers=headers)
        assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        reply = await here.client.post(path, json={**BODY, "max_tokens": 5}, headers=headers)
        assert (reply.status_code, reply.headers["x-ratelimit-limit-requests"]) == (429, "1")
        assert 58 <= int(reply.headers["retry-after"]) <= 60
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert (await here.client.get("/v1/models", headers=headers)).status_code == 200


async def test_prompt_and_reply_are_charged_also_when_the_client_leaves(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, whole = file.add("whole", tokens_per_minute=100)
    _, leaves = file.add("leaves", tokens_per_minute=100)

    async def talks(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        for _ in range(40):
            yield text("on ")
        if request.max_tokens == 1000:
            await asyncio.sleep(60)
        yield finish(40, prompt=30)

    async with world(config={"keys_file": file.path, "require_key": True}) as here:
        here.worker.script = talks

        async def left(key: str) -> int:
            reply = await here.client.post(
                "/v1/chat/completions", json={"model": "none"}, headers={"Authorization": f"Bearer {key}"}
            )
            return int(reply.headers["x-ratelimit-remaining-tokens"])

        await here.client.post("/v1/chat/completions", json=BODY, headers={"Authorization": f"Bearer {whole}"})
        assert 30 <= await left(whole) <= 35
        body = {**BODY, "stream": True, "max_tokens": 1000}
        headers = {"Authorization": f"Bearer {leaves}"}
        async with here.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            lines = reply.aiter_lines()
            for _ in range(60):
                await anext(lines)
        await here.worker.until_running(0)
        assert await left(leaves) < 80


async def test_a_request_at_a_time_means_one_until_the_stream_is_over(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, key = file.add("ci", max_streams=1)
    headers = {"Authorization": f"Bearer {key}"}

    async def waits(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield text("on ")
        await asyncio.sleep(60)

    async with world(config={"keys_file": file.path, "require_key": True}) as here:
        script, here.worker.script = here.worker.script, waits
        body = {**BODY, "stream": True}
        async with here.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            await anext(reply.aiter_lines())
            assert (await here.client.post("/v1/chat/completions", json=BODY, headers=headers)).status_code == 429
        await here.worker.until_running(0)
        here.worker.script = script
        async with asyncio.timeout(5):
            while (await here.client.post("/v1/chat/completions", json=BODY, headers=headers)).status_code != 200:
                await asyncio.sleep(0.02)

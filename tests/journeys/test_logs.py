"""One request's way through gateway, orchestrator and worker, told by `hostler logs`."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.journeys.server import Server, Servers, wait_until

pytestmark = [pytest.mark.journey, pytest.mark.timeout(200)]

LOADED_WHEN_ASKED_FOR = """\
models:
  - {name: one, engine: scripted}
gateways: 1
"""


def entries(server: Server, request_id: str) -> list[dict[str, Any]]:
    told = server.hostler("logs", "--request-id", request_id, "--json", "--port", str(server.port))
    assert told.returncode == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines()]


def answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/v1/models", timeout=5).json()["data"] != []
    except (httpx.HTTPError, KeyError, ValueError):
        return False


def test_a_request_is_found_in_the_log_of_every_process(hostler_server: Servers) -> None:
    server = hostler_server(config=LOADED_WHEN_ASKED_FOR, wait_ready=False)
    wait_until(lambda: answers(server), 60, "the gateway answers")
    body = {"model": "one", "messages": [{"role": "user", "content": "a secret plan"}]}
    headers = {"x-request-id": "way-of-one-1"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    wait_until(lambda: len(entries(server, "way-of-one-1")) >= 3, 10, "three processes tell of the request")
    told = {entry["process"].split("-")[0]: entry for entry in entries(server, "way-of-one-1")}
    assert set(told) == {"gateway", "orchestrator", "worker"}
    assert (told["orchestrator"]["model"], told["orchestrator"]["outcome"]) == ("one", "ready")
    assert (told["worker"]["call"], told["worker"]["outcome"]) == ("generate", "served")
    assert told["gateway"]["status"] == 200
    assert told["worker"]["duration_ms"] <= told["gateway"]["duration_ms"]
    assert entries(server, "way-of-one") == []  # no part of an id is taken for it
    everything = server.hostler("logs", "-n", "100000", "--port", str(server.port)).stdout
    assert "a secret plan" not in everything

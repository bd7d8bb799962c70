"""Promises to every client, whatever it asks for: request ids, harmless fields, preflights."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.fakes import MODEL, World, world

TURN = {"messages": [{"role": "user", "content": "hello"}]}
HARMLESS: dict[str, Any] = {
    "user": "u1",
    "metadata": {"chat": "1"},
    "store": False,
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "parallel_tool_calls": True,
}


async def test_every_kind_of_reply_carries_a_request_id(served: World) -> None:
    ask = {"model": MODEL, **TURN}
    replies = [
        await served.client.get("/v1/models"),
        await served.client.post("/v1/chat/completions", json=ask),
        await served.client.post("/v1/chat/completions", json={**ask, "stream": True}),
        await served.client.post("/v1/responses", json={"model": MODEL, "input": "hi", "stream": True}),
        await served.client.post("/v1/chat/completions", json={"model": "nobody", **TURN}),
        await served.client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}),
        await served.client.get("/nowhere"),
        await served.client.options("/v1/chat/completions"),
        await served.client.head("/"),
        await served.client.get("/v1/models", headers={"host": "evil.example.org"}),
    ]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 200, 404, 400, 404, 204, 200, 403]
    ids = [reply.headers["x-request-id"] for reply in replies]
    assert len(set(ids)) == len(ids)
    async with world(config={"api_key": "correct-horse-battery"}) as locked:
        assert (await locked.client.get("/v1/models")).headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**TURN, "verbosity": "low", "prediction": None}),
        ("/v1/responses", {"input": "hi", "text": {"verbosity": "low"}, "include": [], "client_metadata": {}}),
    ],
)
async def test_fields_that_change_no_answer_are_taken(called: World, path: str, body: dict[str, Any]) -> None:
    reply = await called.client.post(path, json={"model": MODEL, **body, **HARMLESS})
    assert reply.status_code == 200, reply.text

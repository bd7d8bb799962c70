"""Who may share a worker's cached prompts with whom. Our own rule: one API key cannot time another's prompts."""

from __future__ import annotations

import pytest
from hostler.errors import Unavailable

from gateway.auth import KEYLESS_SCOPE, KeyCheck
from tests.gateway.fakes import MODEL, World, fail_once, route, world

KEY = "k" * 32
OTHER_KEY = "o" * 32
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "secret"}]}


async def scopes_seen(key: str | None, header: str = "authorization", **body: object) -> list[str]:
    """Return the cache scopes that a worker sees of one request to a gateway of this key."""
    headers = {header: f"Bearer {key}" if header == "authorization" else key} if key else {}
    async with world(over_tcp=False, config={"api_key": key} if key else {}) as here:
        reply = await here.client.post("/v1/chat/completions", json={**BODY, **body}, headers=headers)
        assert reply.status_code == 200
        return [request.cache_scope for request in here.worker.requests]


async def test_each_key_has_a_scope_of_its_own_which_is_not_the_key() -> None:
    (mine,), (other,) = await scopes_seen(KEY), await scopes_seen(OTHER_KEY)
    assert mine
    assert other
    assert len({mine, other, KEYLESS_SCOPE}) == 3
    assert KEY not in mine


async def test_one_key_has_the_same_scope_in_every_gateway_and_in_both_headers() -> None:
    assert await scopes_seen(KEY) == await scopes_seen(KEY) == await scopes_seen(KEY, "x-api-key")


async def test_callers_without_a_key_share_one_scope() -> None:
    assert await scopes_seen(None) == await scopes_seen(None) == [KEYLESS_SCOPE]


async def test_a_client_without_a_key_cannot_choose_its_scope() -> None:
    assert await scopes_seen(None, cache_scope="x", prompt_cache_key="x") == [KEYLESS_SCOPE]


async def test_every_choice_carries_the_scope() -> None:
    scopes = await scopes_seen(KEY, n=3)
    assert len(scopes) == 3
    assert len(set(scopes)) == 1
    assert scopes[0]


async def test_a_retry_carries_the_scope(called: World) -> None:
    spare = await called.add_worker("b")
    called.worker.script = spare.script = fail_once(Unavailable("draining"))
    await called.publish(route(called.worker, spare))
    assert (await called.chat()).status_code == 200
    assert [r.cache_scope for r in (*called.worker.requests, *spare.requests)] == [KEYLESS_SCOPE] * 2


@pytest.mark.parametrize("headers", [[], [(b"x-api-key", OTHER_KEY.encode())], [(b"authorization", b"Basic eDp5")]])
def test_a_wrong_key_is_not_let_in(headers: list[tuple[bytes, bytes]]) -> None:
    assert not KeyCheck(KEY).allows(headers)

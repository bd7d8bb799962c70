"""Who may come in, and what every path answers: keys, hosts, methods, slashes, ids, CORS, shapes of errors."""

from __future__ import annotations

import pytest
from hostler.config import ConfigError, HostlerConfig
from starlette.routing import Route

from gateway.app import create_app
from gateway.auth import HostCheck, KeyCheck, is_loopback
from gateway.doors import canonical_path, choose_request_id
from tests.gateway.fakes import MODEL, World, world

KEY = "correct-horse-battery"
PATHS = ("/", "/v1", "/v1/chat/completions", "/chat/completions", "/v1/models", "/load_model", "/ready", "/nowhere")


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("/v1/models", "/models"),
        ("/v1/models/", "/models"),
        ("/models", "/models"),
        ("//v1/models", "/models"),
        ("/v1", "/"),
        ("/", "/"),
        ("/v1beta/models", "/v1beta/models"),
        ("/v1/models/org/name/", "/models/org/name"),
    ],
)
def test_paths_are_rewritten_and_never_redirected(path: str, canonical: str) -> None:
    assert canonical_path(path) == canonical


def test_a_harmless_request_id_is_kept_and_any_other_replaced() -> None:
    assert choose_request_id([(b"x-request-id", b"a-B:c._9")]) == "a-B:c._9"
    for value in (b"", b"a b", b"x" * 129, b"a\xff", b"a\nb", b'"'):
        assert choose_request_id([(b"x-request-id", value)]).startswith("req_")


def test_only_names_of_this_server_pass_the_host_check() -> None:
    check = HostCheck("127.0.0.1", ("box.lan", "tunnel.example:8443"), has_key=False)
    for host in (b"localhost", b"LOCALHOST:1", b"127.0.0.1:8000", b"[::1]:8000", b"[::1]", b"box.lan:9", b"box.lan."):
        assert check.allows([(b"host", host)]), host
    assert check.allows([(b"host", b"tunnel.example:8443")])
    for host in (b"evil.example", b"localhost.evil.example", b"127.0.0.1.nip.io", b"", b"tunnel.example", b"[::2]"):
        assert not check.allows([(b"host", host)]), host
    assert not check.allows([])
    assert not check.allows([(b"host", b"localhost"), (b"host", b"evil.example")])
    assert HostCheck("0.0.0.0", (), has_key=True).allows([(b"host", b"anything.example")])
    assert not HostCheck("127.0.0.1", (), has_key=True).allows([(b"host", b"anything.example")])


def test_a_key_comes_as_bearer_or_as_x_api_key() -> None:
    check = KeyCheck(KEY)
    key = KEY.encode()
    for headers in (
        [(b"authorization", b"Bearer " + key)],
        [(b"authorization", b"bearer  " + key)],
        [(b"x-api-key", key)],
        [(b"authorization", b"Bearer other"), (b"x-api-key", key)],
    ):
        assert check.allows(headers)
    for headers in ([], [(b"authorization", key)], [(b"x-api-key", key[:-1])], [(b"x-api-key", b"\xff")]):
        assert not check.allows(headers)


def test_loopback_is_told_from_everything_else() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))


def test_an_open_door_without_a_key_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="api_key"):
        create_app(HostlerConfig(host="0.0.0.0"), placement_target="unix:/nowhere")


async def test_every_route_and_method_wants_the_key() -> None:
    async with world(over_tcp=False, config={"api_key": KEY}) as here:
        known = {route.path for route in here.app.routes if isinstance(route, Route)}
        assert {"/chat/completions", "/models", "/load_model", "/health", "/ready"} <= known
        for path in sorted(known | set(PATHS)):
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY"):
                reply = await here.client.request(method, path, content=b"{")
                if (method, path) == ("GET", "/health"):
                    assert reply.status_code == 200
                    continue
                assert reply.status_code == 401, (method, path)
                is_anthropic = path.startswith("/messages")
                told = reply.json()["error"]
                assert told["type"] == "authentication_error"
                assert is_anthropic or told["code"] == "invalid_api_key"
                assert reply.headers["x-request-id"]
        assert (await here.client.get("/v1/health/")).status_code == 200
        reply = await here.client.get("/v1/models", headers={"x-api-key": KEY})
        assert reply.status_code == 200


async def test_options_and_head_answer_everywhere_without_a_key() -> None:
    async with world(over_tcp=False, config={"api_key": KEY}) as here:
        for path in PATHS:
            assert (await here.client.options(path)).status_code == 204
            reply = await here.client.head(path)
            assert (reply.status_code, reply.content) == (200, b"")


async def test_a_strange_host_is_refused_before_anything_else(called: World) -> None:
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        reply = await called.client.request(method, "/v1/models", headers={"host": "evil.example"})
        assert reply.status_code == 403
        assert reply.headers["x-request-id"]
    assert (await called.client.get("/v1/models", headers={"host": "evil.example"})).json()["error"]["param"] is None


async def test_unknown_paths_and_wrong_methods_answer_in_openai_shape(called: World) -> None:
    for path in ("/docs", "/redoc", "/admin", "/v1/nothing"):
        reply = await called.client.get(path)
        assert reply.status_code == 404
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    reply = await called.client.get("/v1/chat/completions")
    assert reply.status_code == 405
    assert reply.json()["error"]["code"] == "method_not_allowed"


async def test_trailing_slashes_and_the_root_reach_the_same_routes(called: World) -> None:
    for path in ("/v1/models", "/v1/models/", "/models", "/models/"):
        assert (await called.client.get(path)).status_code == 200
    for path in ("/v1/chat/completions/", "/chat/completions"):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        assert (await called.client.post(path, json=body)).status_code == 200


async def test_an_unexpected_exception_is_a_500_that_tells_nothing(called: World) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("/secret/path")

    called.app.state.services.dispatcher.generate = explode
    reply = await called.chat("x")
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text
    assert reply.headers["x-request-id"]

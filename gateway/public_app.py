"""The application behind a tunnel or proxy: the models' API for holders of the key, and nothing else of the server.

Above: `__main__`, which serves it on a listening socket of its own; below: the same routes and `Services` as `app`.
A request passes `Envelope` → `Listed` → CORS (when configured) → `Gate` → a route. What `PUBLIC` does not name is not
there: administration, metrics, the API's description, `/ready`, and whatever a later route may be. Addresses of clients
and X-Forwarded-* mean nothing here; the key alone lets in.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI
from hostler.config import ConfigError
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.app import add_doors
from gateway.auth import normal_host, without_port
from gateway.doors import Envelope, Gate, request_id_of
from gateway.error_reply import error_response
from gateway.errors import RouteNotFound, as_hostler_error
from gateway.linked_images import LinkedImages
from gateway.responses.answer import Answering
from gateway.routes import (
    audio_models,
    chat,
    completions,
    conversations,
    embeddings,
    health,
    messages,
    models,
    rerank,
    responses,
    speech,
    tokenize,
    transcriptions,
    voices,
)
from gateway.services import Services, fetcher

_CONVERSATION = "/conversations/{conversation_id}"
_RESPONSE = "/responses/{response_id}"
PUBLIC = frozenset(
    {
        ("GET", "/health"),
        ("GET", "/models"),
        ("GET", "/models/{model:path}"),
        ("POST", "/chat/completions"),
        ("POST", "/completions"),
        ("POST", "/messages"),
        ("POST", "/messages/count_tokens"),
        ("POST", "/responses"),
        ("POST", "/responses/input_tokens"),
        ("GET", _RESPONSE),
        ("DELETE", _RESPONSE),
        ("POST", f"{_RESPONSE}/cancel"),
        ("GET", f"{_RESPONSE}/input_items"),
        ("POST", "/conversations"),
        ("GET", _CONVERSATION),
        ("POST", _CONVERSATION),
        ("DELETE", _CONVERSATION),
        ("GET", f"{_CONVERSATION}/items"),
        ("POST", f"{_CONVERSATION}/items"),
        ("GET", f"{_CONVERSATION}/items/{{item_id}}"),
        ("DELETE", f"{_CONVERSATION}/items/{{item_id}}"),
        ("POST", "/embeddings"),
        ("POST", "/rerank"),
        ("POST", "/v2/rerank"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/audio/speech"),
        ("POST", "/audio/transcriptions"),
        ("POST", "/audio/translations"),
        ("GET", "/audio/models"),
        ("GET", "/audio/voices"),
    }
)
"""Method and path of everything that is served here."""
FIRST_PING_S = 1.0
"""Silence after which a stream begins with a comment: proxies that time out or hold back see that it lives."""
_ROOMS = (
    chat,
    responses,
    conversations,
    messages,
    completions,
    embeddings,
    rerank,
    speech,
    voices,
    transcriptions,
    audio_models,
    tokenize,
    models,
    health,
)
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


class PublicHosts:
    """The names that Host may carry: those of the configuration, and that of the tunnel once it is up.

    Args:
        names: with or without a port.
        told: where the tunnel tells its address, as `{"url": "https://…"}`; only this user can write there.
    """

    def __init__(self, names: Iterable[str], told: Path | None = None) -> None:
        self._names = frozenset(normal_host(name) for name in names)
        self._told = told
        self._seen = (0, 0)
        self._tunnel = ""

    def allows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Return whether the one Host header names this server. Loopback names do only if they are configured."""
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1:
            return False
        host = normal_host(hosts[0].decode("latin-1"))
        bare = without_port(host)
        return host in self._names or bare in self._names or (bool(bare) and bare == self._tunnel_name())

    def _tunnel_name(self) -> str:
        if self._told is None:
            return ""
        try:
            stat = self._told.stat()
            if (now := (stat.st_mtime_ns, stat.st_ino)) != self._seen:
                name = (urlsplit(json.loads(self._told.read_text(encoding="utf-8"))["url"]).hostname or "").lower()
                self._tunnel, self._seen = name if _HOST.fullmatch(name) else "", now
        except (OSError, ValueError, KeyError, TypeError):
            self._tunnel, self._seen = "", (0, 0)  # the tunnel is down: its name may be another's by now
        return self._tunnel


class Listed:
    """Lets nothing pass whose path is not served here: 404, whoever asks. `/` stays, for those who probe it."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 404."""
        if scope["type"] != "http" or scope["path"] == "/" or self._is_listed(scope):
            await self._app(scope, receive, send)
            return
        error = as_hostler_error(RouteNotFound("Nothing is served under this path."), request_id=request_id_of(scope))
        await error_response(error, scope)(scope, receive, send)

    def _is_listed(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] != Match.NONE for route in self._routes)


def create_public_app(services: Services, *, told: Path | None = None) -> FastAPI:
    """Build the application; it shares `services` with the local one, whose lifespan opens and closes them.

    Args:
        services: of the local application.
        told: file in which the tunnel tells its address.

    Raises:
        ConfigError: there is no API key.
    """
    config = services.config
    if services.ring.is_empty:
        raise ConfigError("public: everybody could use this server; run hostler key create NAME, or set api_key")
    app = FastAPI(title="hostler", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    found = [route for room in _ROOMS for route in room.router.routes if isinstance(route, Route)]
    routes = [route for route in found if any((method, route.path) in PUBLIC for method in route.methods or ())]
    app.router.routes.extend(routes)

    def share() -> None:
        app.state.services = public_view(services)

    services.on_open.append(share)
    names = [*config.public.hosts, *([urlsplit(config.public.url).netloc] if config.public.url else [])]
    hosts = PublicHosts(names, told)
    gate = partial(Gate, host_check=hosts, ring=services.ring, limits=services.limits, demands=True)
    add_doors(app, gate, config.public.cors, allow_private_network=False)
    app.add_middleware(Listed, routes=routes)
    app.add_middleware(Envelope, meter=services.meter)
    return app


def public_view(services: Services) -> Services:
    """Return the opened services as strangers get them: quicker signs of life, and no addresses of theirs fetched."""
    view = copy.copy(services)
    view.patience = replace(services.patience, first_ping_s=min(FIRST_PING_S, services.patience.first_ping_s))
    fetches = services.config.public.fetch_urls
    view.linked_images = LinkedImages(fetcher() if fetches else None)
    view.mcp = services.mcp if fetches else services.mcp.without_addresses()
    view.answering = Answering(
        view.table, view.dispatcher, view.linked_images, view.responses, view.mcp, view.patience.first_table_s
    )
    return view

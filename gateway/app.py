"""The application: configuration in, ASGI out. Above: `server` and tests; below: every other file of this room.

A request passes `Envelope` → CORS (when configured) → `Gate` → a route. Nothing is served but the public API.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request, Response
from hostler.config import ConfigError, HostlerConfig
from hostler.errors import HostlerError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from gateway.auth import HostCheck, PageCheck
from gateway.doors import ANTHROPIC_ID_HEADER, REQUEST_ID_HEADER, Envelope, Gate, request_id_of
from gateway.error_reply import error_response
from gateway.errors import ClientGone, as_hostler_error
from gateway.keys.limits import KeyLimits
from gateway.keys.ring import KeyRing
from gateway.routes import (
    admin,
    audio_models,
    chat,
    completions,
    conversations,
    embeddings,
    health,
    mcp,
    messages,
    metrics,
    models,
    openapi,
    rerank,
    responses,
    speech,
    tokenize,
    transcriptions,
    voices,
)
from gateway.services import Patience, Services

log = logging.getLogger(__name__)

RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)


def create_app(
    config: HostlerConfig,
    *,
    placement_target: str,
    token: str = "",
    patience: Patience | None = None,
    state_dir: Path | None = None,
) -> FastAPI:
    """Build the application; it connects when its lifespan begins.

    Args:
        config: the resolved configuration.
        placement_target: gRPC target of the orchestrator's placement service.
        token: of this run; workers on other hosts want keys that are made from it.
        patience: deadlines other than the usual ones, for tests.
        state_dir: where stored responses lie that every gateway process of a server shares; None: nowhere lasting.

    Raises:
        ConfigError: it would be open to strangers.
    """
    demands = config.demands_key
    ring = KeyRing(config.api_key, config.keys_file, demands=demands)
    if demands and ring.is_empty:
        raise ConfigError(
            f"host {config.host!r} wants an API key and there is none: set api_key, or run hostler key create laptop"
        )
    if not demands and "*" in config.cors:
        log.warning("every web page may use this server: cors is '*' and no key is demanded")
    services = Services(
        config=config,
        placement_target=placement_target,
        token=token,
        patience=patience or Patience(),
        state_dir=state_dir,
        ring=ring,
        limits=KeyLimits(state_dir / "limits" if state_dir else None),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with services.open():
            yield

    app = FastAPI(
        title="hostler", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    app.state.services = services
    rooms = (
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
        admin,
        mcp,
        health,
        metrics,
        openapi,
    )
    for room in rooms:
        app.router.routes.extend(room.router.routes)
    host_check = HostCheck(config.host, config.allowed_hosts, has_key=demands)
    page_check = None if demands else PageCheck(config.cors, host_check)
    gate = partial(Gate, host_check=host_check, ring=ring, limits=services.limits, page_check=page_check)
    add_doors(app, gate, config.cors, allow_private_network=True)
    app.add_middleware(Envelope, meter=services.meter)
    return app


def add_doors(
    app: FastAPI, gate: Callable[[ASGIApp], Gate], origins: Sequence[str], *, allow_private_network: bool
) -> None:
    """Give an application its answers to failures, its gate, and around that CORS where origins are let in."""
    for kind in (HostlerError, HTTPException, ClientGone):
        app.add_exception_handler(kind, answer_error)
    # The last one added is the outermost.
    app.add_middleware(gate)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("*",),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER, ANTHROPIC_ID_HEADER, "retry-after", *RATE_HEADERS),
            allow_private_network=allow_private_network,
        )


async def answer_error(request: Request, exception: Exception) -> Response:
    """Return the reply to a request that failed, in the shape of its dialect."""
    if isinstance(exception, ClientGone):
        return Response(status_code=499)
    return error_response(as_hostler_error(exception, request_id=request_id_of(request.scope)), request.scope)

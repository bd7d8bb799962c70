"""The application: configuration in, ASGI out. Above: `server` and tests; below: every other file of this room.

A request passes `Envelope` → CORS (when configured) → `Gate` → a route. Nothing is served but the public API.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from hostler.config import ConfigError, HostlerConfig
from hostler.errors import HostlerError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gateway.auth import HostCheck, KeyCheck, is_loopback
from gateway.doors import ANTHROPIC_ID_HEADER, REQUEST_ID_HEADER, Envelope, Gate, request_id_of
from gateway.error_reply import error_response
from gateway.errors import ClientGone, as_hostler_error
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
    if config.api_key is None and not is_loopback(config.host):
        raise ConfigError(f"host {config.host!r} can be reached from elsewhere: set api_key, or listen on 127.0.0.1")
    if config.api_key is None and "*" in config.cors:
        log.warning("every web page may use this server: cors is '*' and there is no api_key")
    services = Services(
        config=config,
        placement_target=placement_target,
        token=token,
        patience=patience or Patience(),
        state_dir=state_dir,
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
    for kind in (HostlerError, HTTPException, ClientGone):
        app.add_exception_handler(kind, answer_error)
    # The last one added is the outermost.
    app.add_middleware(
        Gate,
        host_check=HostCheck(config.host, config.allowed_hosts, has_key=config.api_key is not None),
        key_check=KeyCheck(config.api_key) if config.api_key else None,
    )
    if config.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors,
            allow_methods=("*",),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER, ANTHROPIC_ID_HEADER, "retry-after"),
            allow_private_network=True,
        )
    app.add_middleware(Envelope, meter=services.meter)
    return app


async def answer_error(request: Request, exception: Exception) -> Response:
    """Return the reply to a request that failed, in the shape of its dialect."""
    if isinstance(exception, ClientGone):
        return Response(status_code=499)
    return error_response(as_hostler_error(exception, request_id=request_id_of(request.scope)), request.scope)

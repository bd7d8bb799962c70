"""POST /embeddings. Above: `app`; below: the OpenAI embeddings dialect, `dispatch`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from gateway.body import read_json
from gateway.dialects.openai_embeddings.reply import embeddings_object
from gateway.dialects.openai_embeddings.request import parse_embeddings_request
from gateway.dialects.texts import check_lengths
from gateway.doors import request_id_of
from gateway.json_response import json_response
from gateway.routing import find_embedding_model
from gateway.services import services_of

router = APIRouter()


@router.post("/embeddings", response_model=None)
async def create_embeddings(request: Request) -> Response:
    """Answer one embeddings request."""
    services = services_of(request)
    wanted = parse_embeddings_request(await read_json(request.headers, request.receive, services.config.max_body))
    routes = await services.table.first(services.patience.first_table_s)
    target = find_embedding_model(routes, wanted.model)
    if target.route.HasField("info"):
        check_lengths(wanted.inputs, target.route.info.max_context_tokens, "input")
    message = wanted.message()
    asking = services.dispatcher.ask(target, lambda stub: stub.Embed, message, request_id_of(request.scope))
    reply = await services.lifetime.until_gone(request.receive, asking)
    return json_response(embeddings_object(reply, target.name, as_base64=wanted.as_base64))

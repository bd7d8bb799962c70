"""POST /rerank, and /v2/rerank for Cohere's client. Above: `app`; below: the rerank dialect, `dispatch`."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request, Response
from hostler.inference.v1 import inference_pb2 as pb

from gateway.body import read_json
from gateway.dialects.rerank.reply import ranking_object
from gateway.dialects.rerank.request import parse_rank_request
from gateway.doors import request_id_of
from gateway.json_response import json_response
from gateway.routing import find_ranking_model
from gateway.services import services_of

router = APIRouter()


@router.post("/rerank", response_model=None)
@router.post("/v2/rerank", response_model=None)
async def rank_documents(request: Request) -> Response:
    """Answer one rerank request."""
    services = services_of(request)
    wanted = parse_rank_request(await read_json(request.headers, request.receive, services.config.max_body))
    routes = await services.table.first(services.patience.first_table_s)
    target = find_ranking_model(routes, wanted.model)
    message = pb.RerankRequest(query=wanted.query, documents=wanted.documents)
    asking = services.dispatcher.ask(target, lambda stub: stub.Rerank, message, request_id_of(request.scope))
    reply = await services.lifetime.until_gone(request.receive, asking)
    return json_response(ranking_object(reply, wanted, reply_id=f"rerank-{uuid.uuid4().hex}", model=target.name))

"""POST /tokenize and /detokenize, in vLLM's words. Above: `app`; below: `dispatch`, the chat dialect's request."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.body import read_json
from gateway.dialects.openai_chat.request import check_capabilities, parse_chat_request
from gateway.dialects.texts import MAX_TOKEN_IDS, check_lengths
from gateway.doors import request_id_of
from gateway.fields import MAX_MODEL_CHARS, Fields
from gateway.json_response import json_response
from gateway.routing import Routes, Target, find_model
from gateway.services import services_of

router = APIRouter()

_NO_CAP = 1 << 62  # the body's own cap bounds it
# Would change the answer and cannot be honoured. The value is what is harmless to ask for.
_REFUSED: dict[str, tuple[Any, ...]] = {"return_token_strs": (False,), "add_generation_prompt": (True,)}


@router.post("/tokenize", response_model=None)
async def tokenize(request: Request) -> Response:
    """Return the token ids of a `prompt`, or of `messages` as the model's chat template renders them."""
    services = services_of(request)
    body = await read_json(request.headers, request.receive, services.config.max_body)
    routes = await services.table.first(services.patience.first_table_s)
    target = _target(routes, body)
    message = _tokenize_request(Fields(body), body, target)
    asking = services.dispatcher.ask(target, lambda stub: stub.Tokenize, message, request_id_of(request.scope))
    reply = await services.lifetime.until_gone(request.receive, asking)
    return json_response(
        {
            "count": len(reply.ids),
            "max_model_len": reply.max_context_tokens,
            "tokens": list(reply.ids),
            "token_strs": None,
        }
    )


@router.post("/detokenize", response_model=None)
async def detokenize(request: Request) -> Response:
    """Return the text of `tokens`."""
    services = services_of(request)
    body = await read_json(request.headers, request.receive, services.config.max_body)
    fields = Fields(body)
    if fields.raw("tokens") is None:
        raise fields.missing("tokens")
    ids = fields.array("tokens", MAX_TOKEN_IDS) or []
    for index, value in enumerate(ids):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise InvalidRequest(f"Invalid 'tokens[{index}]': not a token id.", param=f"tokens[{index}]")
    routes = await services.table.first(services.patience.first_table_s)
    target = _target(routes, body)
    message = pb.DetokenizeRequest(ids=ids)
    asking = services.dispatcher.ask(target, lambda stub: stub.Detokenize, message, request_id_of(request.scope))
    reply = await services.lifetime.until_gone(request.receive, asking)
    return json_response({"prompt": reply.text})


def _target(routes: Routes, body: dict[str, Any]) -> Target:
    """Return the model that is meant; a server of one model need not be told which."""
    name = Fields(body).string("model", MAX_MODEL_CHARS)
    if name:
        return find_model(routes, name)
    if len(routes.models) == 1:
        return Target(routes.models[0])
    raise InvalidRequest("You must provide a model parameter.", param="model")


def _tokenize_request(fields: Fields, body: dict[str, Any], target: Target) -> pb.TokenizeRequest:
    for name, harmless in _REFUSED.items():
        value = fields.raw(name)
        if value is not None and value not in harmless:
            raise UnsupportedParameter(f"'{name}' is not supported with that value. Remove it.", param=name)
    if fields.raw("messages") is not None:
        chat = parse_chat_request({**body, "model": target.name})
        if chat.links:
            raise UnsupportedParameter("Images by address are not fetched to count tokens.", param="messages")
        if target.route.HasField("info"):
            check_capabilities(chat, target.route.info)
        return pb.TokenizeRequest(chat=chat.generate.chat)
    prompt = fields.string("prompt", _NO_CAP)
    if prompt is None:
        raise fields.missing("prompt")
    if target.route.HasField("info"):
        check_lengths([prompt], target.route.info.max_context_tokens, "prompt")
    special = fields.boolean("add_special_tokens")
    return pb.TokenizeRequest(text=prompt, add_special_tokens=True if special is None else special)

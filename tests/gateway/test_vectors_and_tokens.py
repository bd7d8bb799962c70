"""Embeddings (OpenAI's rules), rerank (Cohere's and Jina's), tokens (vLLM's), and unary calls at all."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import httpx
import pytest
from hostler.errors import InvalidRequest, Unavailable
from hostler.inference.v1 import inference_pb2 as pb
from hostler.lifecycle.v1 import lifecycle_pb2

from tests.gateway.fakes import MODEL, World, route


async def vectors(request: pb.EmbedRequest) -> pb.EmbedResponse:
    embeddings = [pb.Embedding(values=[index, 0.5]) for index in range(len(request.inputs))]
    return pb.EmbedResponse(embeddings=embeddings, usage=pb.Usage(num_prompt_tokens=7))


async def scores(request: pb.RerankRequest) -> pb.RerankResponse:
    return pb.RerankResponse(scores=[len(d) / 10 for d in request.documents], usage=pb.Usage(num_prompt_tokens=9))


async def publish(world: World, engine: lifecycle_pb2.EngineKind.ValueType) -> None:
    published = route(world.worker)
    published.engine = engine
    await world.publish(published)


@pytest.fixture
async def embedder(called: World) -> World:
    await publish(called, lifecycle_pb2.ENGINE_KIND_EMBEDDING)
    called.worker.answer = vectors
    return called


@pytest.fixture
async def ranker(called: World) -> World:
    await publish(called, lifecycle_pb2.ENGINE_KIND_RERANK)
    called.worker.answer = scores
    return called


async def post(world: World, path: str, **fields: Any) -> httpx.Response:
    return await world.client.post(path, json={"model": MODEL, **fields})


async def test_embeddings_are_numbers_or_base64_of_float32_in_the_order_of_the_inputs(embedder: World) -> None:
    plain = (await post(embedder, "/v1/embeddings", input=["a", "b"])).json()
    assert plain["object"] == "list"
    assert plain["data"] == [
        {"object": "embedding", "index": 0, "embedding": [0.0, 0.5]},
        {"object": "embedding", "index": 1, "embedding": [1.0, 0.5]},
    ]
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    packed = (await post(embedder, "/embeddings", input=["a", "b"], encoding_format="base64")).json()
    assert struct.unpack("<2f", base64.b64decode(packed["data"][1]["embedding"])) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("given", "texts", "ids"),
    [
        ("a", ["a"], []),
        (["a", "b"], ["a", "b"], []),
        ([5, 6], [], [[5, 6]]),
        ([[5], [6, 7]], [], [[5], [6, 7]]),
    ],
)
async def test_inputs_are_texts_or_token_ids(embedder: World, given: Any, texts: list[str], ids: list[Any]) -> None:
    assert (await post(embedder, "/v1/embeddings", input=given, dimensions=2)).status_code == 200
    (asked,) = embedder.worker.asked
    assert [item.text for item in asked.inputs if item.HasField("text")] == texts
    assert [list(item.token_ids.ids) for item in asked.inputs if item.HasField("token_ids")] == ids
    assert asked.dimensions == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": {"image": "x"}}, "input"),
        ({"input": [{"image": "x"}]}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
        ({"input": "a" * (8192 * 256 + 1)}, "input"),
    ],
)
async def test_bad_embedding_requests_name_the_field(embedder: World, fields: dict[str, Any], param: str) -> None:
    reply = await post(embedder, "/v1/embeddings", **fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert embedder.worker.asked == []


async def test_results_come_best_first_with_their_place_in_the_request(ranker: World) -> None:
    documents = ["aa", {"text": "aaaa"}, "a"]
    body = {"query": "q", "documents": documents, "top_n": 2, "return_documents": True}
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        reply = (await post(ranker, path, **body)).json()
        assert [(r["index"], r["document"]) for r in reply["results"]] == [(1, {"text": "aaaa"}), (0, {"text": "aa"})]
        assert reply["results"][0]["relevance_score"] == pytest.approx(0.4)
        assert reply["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    plain = (await post(ranker, "/rerank", query="q", documents=["a"])).json()
    assert plain["results"] == [{"index": 0, "relevance_score": pytest.approx(0.1)}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": ["a", {"title": "b"}]}, "documents[1]"),
        ({"query": "q", "documents": [5]}, "documents[0]"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "q", "documents": ["a"], "rank_fields": ["title"]}, "rank_fields"),
        ({"query": "q", "documents": ["a"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
    ],
)
async def test_bad_rerank_requests_name_the_field(ranker: World, fields: dict[str, Any], param: str) -> None:
    reply = await post(ranker, "/rerank", **fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_a_model_of_another_kind_is_refused_before_it_is_asked(called: World) -> None:
    await publish(called, lifecycle_pb2.ENGINE_KIND_TEXT)
    for path, fields in (("/embeddings", {"input": "a"}), ("/rerank", {"query": "q", "documents": ["a"]})):
        reply = await post(called, path, **fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    await publish(called, lifecycle_pb2.ENGINE_KIND_RERANK)
    assert (await post(called, "/embeddings", input="a")).status_code == 400
    assert (await called.chat()).status_code == 400


async def test_a_workers_refusal_reaches_the_client_with_its_field(embedder: World) -> None:
    async def refuse(request: Any) -> Any:
        raise InvalidRequest("too many dimensions", param="dimensions")

    embedder.worker.answer = refuse
    reply = await post(embedder, "/embeddings", input="a", dimensions=9999)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "dimensions")


async def test_a_worker_that_drains_costs_time_only(embedder: World) -> None:
    async def drain(request: Any) -> Any:
        raise Unavailable("draining")

    embedder.worker.answer = drain
    other = await embedder.add_worker("b", generation=8)
    other.answer = vectors
    published = route(embedder.worker, other)
    published.engine = lifecycle_pb2.ENGINE_KIND_EMBEDDING
    await embedder.publish(published)
    # Whichever is asked first, the answer is the other's.
    for _ in range(4):
        assert (await post(embedder, "/embeddings", input="a")).status_code == 200
    assert len(other.asked) == 4


async def test_a_client_that_leaves_ends_the_workers_call(served: World) -> None:
    await publish(served, lifecycle_pb2.ENGINE_KIND_EMBEDDING)

    async def never(request: Any) -> Any:
        await asyncio.Event().wait()

    served.worker.answer = never
    call = asyncio.create_task(post(served, "/embeddings", input="a"))
    await served.worker.until_running(1)
    call.cancel()
    await served.worker.until_running(0)


async def test_prompts_and_chats_are_tokenized_in_vllms_shape(called: World) -> None:
    async def tokens(request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(ids=[4, 5], max_context_tokens=99)

    called.worker.answer = tokens
    for path, fields in (
        ("/tokenize", {"prompt": "hi"}),
        ("/v1/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        reply = (await post(called, path, **fields)).json()
        assert reply == {"count": 2, "max_model_len": 99, "tokens": [4, 5], "token_strs": None}
    # The only model needs no name.
    await called.client.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False})
    text, chat, bare = called.worker.asked
    assert (text.text, text.add_special_tokens) == ("hi", True)
    assert chat.chat.messages[0].parts[0].text == "hi"
    assert (bare.text, bare.add_special_tokens) == ("hi", False)
    for fields, param in (({}, "prompt"), ({"prompt": "a", "return_token_strs": True}, "return_token_strs")):
        reply = await post(called, "/tokenize", **fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_tokens_become_text_again(called: World) -> None:
    async def text(request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text="-".join(map(str, request.ids)))

    called.worker.answer = text
    assert (await post(called, "/detokenize", tokens=[4, 5])).json() == {"prompt": "4-5"}
    for fields, param in (({}, "tokens"), ({"tokens": [1.5]}, "tokens[0]"), ({"tokens": [-1]}, "tokens[0]")):
        reply = await post(called, "/v1/detokenize", **fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)

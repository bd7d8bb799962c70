"""Scores → results, best first, in the words that Cohere and Jina share. Above: `routes.rerank`."""

from __future__ import annotations

from typing import Any

from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.rerank.request import RankRequest


def ranking_object(reply: pb.RerankResponse, request: RankRequest, *, reply_id: str, model: str) -> dict[str, Any]:
    """Return the reply: `index` is a document's place in the request; equals keep their order."""
    order = sorted(range(len(reply.scores)), key=lambda index: -reply.scores[index])[: request.top_n]
    tokens = reply.usage.num_prompt_tokens
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": reply.scores[index]} for index in order]
    if request.return_documents:
        for result in results:
            result["document"] = {"text": request.documents[result["index"]]}
    return {
        "id": reply_id,
        "object": "list",
        "model": model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }

"""Between the wire and the dataclasses, for embeddings, ranking and tokens. Pure; beside `translate.py`."""

from __future__ import annotations

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from workers.engine import Prompt, TextPrompt, TokenPrompt
from workers.translate import chat_prompt
from workers.vectors import Embedded, EmbeddingRequest, Ranked, RankingRequest


def embedding_request(message: pb.EmbedRequest, request_id: str) -> EmbeddingRequest:
    """Return the engine's form of a request.

    Raises:
        UnsupportedParameter: an image.
        InvalidRequest: an input without contents.
    """
    return EmbeddingRequest(
        inputs=[_input(item) for item in message.inputs],
        dimensions=message.dimensions if message.HasField("dimensions") else None,
        request_id=request_id,
    )


def _input(item: pb.EmbedInput) -> TextPrompt | TokenPrompt:
    kind = item.WhichOneof("input")
    if kind == "text":
        return TextPrompt(item.text)
    if kind == "token_ids":
        return TokenPrompt(tuple(item.token_ids.ids))
    if kind == "image":
        raise UnsupportedParameter("This model makes embeddings of texts, not of images.", param="input")
    raise InvalidRequest("An input is empty.", param="input")


def embed_response(embedded: Embedded) -> pb.EmbedResponse:
    """Return the wire's form of vectors."""
    return pb.EmbedResponse(
        embeddings=[pb.Embedding(values=vector) for vector in embedded.vectors],
        usage=pb.Usage(num_prompt_tokens=embedded.num_tokens),
    )


def ranking_request(message: pb.RerankRequest, request_id: str) -> RankingRequest:
    """Return the engine's form of a request."""
    return RankingRequest(message.query, tuple(message.documents), request_id)


def rerank_response(ranked: Ranked) -> pb.RerankResponse:
    """Return the wire's form of scores."""
    return pb.RerankResponse(scores=ranked.scores, usage=pb.Usage(num_prompt_tokens=ranked.num_tokens))


def tokenize_prompt(message: pb.TokenizeRequest) -> Prompt:
    """Return what is to be tokenized."""
    if message.WhichOneof("prompt") == "chat":
        return chat_prompt(message.chat)
    return TextPrompt(message.text, add_special_tokens=message.add_special_tokens)

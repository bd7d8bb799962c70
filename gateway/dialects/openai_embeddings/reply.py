"""Vectors → OpenAI's list of embeddings. Above: `routes.embeddings`."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable
from typing import Any

from hostler.inference.v1 import inference_pb2 as pb


def embeddings_object(reply: pb.EmbedResponse, model: str, *, as_base64: bool) -> dict[str, Any]:
    """Return the reply, vectors in the order of the inputs."""
    encode = base64_of if as_base64 else list
    data = [
        {"object": "embedding", "index": index, "embedding": encode(item.values)}
        for index, item in enumerate(reply.embeddings)
    ]
    tokens = reply.usage.num_prompt_tokens
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def base64_of(values: Iterable[float]) -> str:
    """Return base64 of the values as little-endian float32."""
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")

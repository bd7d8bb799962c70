"""The contract's messages as the engine sees them."""

from __future__ import annotations

from hostler.inference.v1 import inference_pb2 as pb

from workers import translate
from workers.engine import ModelFacts

FACTS = ModelFacts(model="m", engine="text", architecture="A", dtype="float32", max_context_tokens=64)


def test_the_cache_scope_reaches_the_engine() -> None:
    message = pb.GenerateRequest(text="hi", cache_scope="one key's")
    assert translate.generation_request(message, FACTS, "r").cache_scope == "one key's"

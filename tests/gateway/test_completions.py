"""The completions dialect, as OpenAI's legacy reference has it, and the wire to the worker."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hostler.inference.v1 import inference_pb2 as pb
from hostler.lifecycle.v1 import lifecycle_pb2

from gateway.dialects.openai_completions.logprobs import TextOffsets, token_text
from tests.gateway.event_frames import sse_data
from tests.gateway.fakes import MODEL, World, finish, route


def scored(token: str, logprob: float = -0.5) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=1,
        token=token.encode(),
        logprob=logprob,
        top=[pb.TokenLogprob(token_id=9, token=b"other", logprob=-0.1)],
    )


async def say(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    """Write `<prompt>!`, in two pieces, with logprobs where they are asked for."""
    prompt = request.text or " ".join(map(str, request.token_ids.ids))
    if request.echo_logprobs:
        head = pb.TokenLogprob(token_id=0, token=b"<s>", logprob=math.nan)
        items = [head, *(scored(c) for c in prompt)]
        yield pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(tokens=items))
    for piece in (prompt, "!") if request.max_tokens else ():
        items = [scored(piece)] if request.HasField("top_logprobs") else []
        yield pb.GenerateResponse(text=pb.TextDelta(text=piece, logprobs=items))
    yield finish(2, prompt=4)


async def complete(world: World, **fields: Any) -> httpx.Response:
    world.worker.script = say
    return await world.client.post("/v1/completions", json={"model": MODEL, **fields})


async def test_one_prompt_gives_one_choice_with_openais_default_of_16_tokens(called: World) -> None:
    reply = (await complete(called, prompt="ab")).json()
    assert reply["object"] == "text_completion"
    assert reply["id"].startswith("cmpl-")
    assert reply["choices"] == [{"index": 0, "text": "ab!", "logprobs": None, "finish_reason": "stop"}]
    assert [reply["usage"][f"{k}_tokens"] for k in ("prompt", "completion", "total")] == [4, 2, 6]
    assert called.worker.requests[0].max_tokens == 16
    assert called.worker.requests[0].cache_scope


async def test_prompts_and_choices_are_indexed_prompt_by_prompt(called: World) -> None:
    reply = (await complete(called, prompt=["a", "b"], n=2, seed=5)).json()
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [(0, "a!"), (1, "a!"), (2, "b!"), (3, "b!")]
    assert sorted(r.sampling.seed for r in called.worker.requests) == [5, 5, 6, 6]
    # Each prompt is counted once, each choice's tokens are.
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (8, 8)


@pytest.mark.parametrize(("prompt", "ids"), [([7, 8], [[7, 8]]), ([[7], [8, 9]], [[7], [8, 9]])])
async def test_token_ids_go_to_the_worker_as_they_are(called: World, prompt: Any, ids: Any) -> None:
    assert (await complete(called, prompt=prompt)).status_code == 200
    assert sorted(list(r.token_ids.ids) for r in called.worker.requests) == sorted(ids)


async def test_the_terms_of_a_chat_hold_for_completions_too(called: World) -> None:
    await complete(called, prompt="a", keep_alive="5m", service_tier="flex")
    assert (called.worker.requests[0].keep_alive_ms, called.worker.requests[0].batch) == (300_000, True)


async def test_no_prompt_is_the_beginning_of_a_document(called: World) -> None:
    await complete(called)
    assert called.worker.requests[0].WhichOneof("prompt") == "text"
    assert called.worker.requests[0].text == ""


async def test_logprobs_are_four_lists_along_the_text(called: World) -> None:
    reply = (await complete(called, prompt="köln", logprobs=1)).json()
    assert reply["choices"][0]["logprobs"] == {
        "tokens": ["köln", "!"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"other": pytest.approx(-0.1), "köln": -0.5}, {"other": pytest.approx(-0.1), "!": -0.5}],
        "text_offset": [0, 4],
    }


async def test_echo_puts_the_prompt_and_its_logprobs_first(called: World) -> None:
    reply = (await complete(called, prompt="né", logprobs=0, echo=True)).json()
    choice = reply["choices"][0]
    assert choice["text"] == "néné!"
    assert choice["logprobs"]["tokens"] == ["<s>", "n", "é", "né", "!"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 4]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert called.worker.requests[0].echo_logprobs


async def test_a_prompt_may_be_scored_without_writing_anything(called: World) -> None:
    reply = (await complete(called, prompt="ab", logprobs=1, echo=True, max_tokens=0)).json()
    assert reply["choices"][0]["text"] == "ab"
    assert reply["choices"][0]["logprobs"]["tokens"] == ["<s>", "a", "b"]


async def test_echo_without_logprobs_asks_for_none(called: World) -> None:
    assert (await complete(called, prompt="ab", echo=True)).json()["choices"][0]["text"] == "abab!"
    assert not called.worker.requests[0].echo_logprobs
    assert not called.worker.requests[0].HasField("top_logprobs")


async def test_the_best_of_several_are_those_with_the_likeliest_tokens(called: World) -> None:
    async def ranked(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        value = -float(request.sampling.seed)
        yield pb.GenerateResponse(text=pb.TextDelta(text=str(request.sampling.seed), logprobs=[scored("x", value)]))
        yield finish(1)

    called.worker.script = ranked
    body = {"model": MODEL, "prompt": "a", "n": 2, "best_of": 4, "seed": 1}
    reply = (await called.client.post("/completions", json=body)).json()
    assert [(c["index"], c["text"], c["logprobs"]) for c in reply["choices"]] == [(0, "1", None), (1, "2", None)]
    assert reply["usage"]["completion_tokens"] == 4


async def test_a_stream_echoes_first_finishes_each_choice_once_and_tells_usage_when_asked(served: World) -> None:
    reply = await complete(
        served,
        prompt=["a", "b"],
        stream=True,
        echo=True,
        logprobs=0,
        stream_options={"include_usage": True},
    )
    *data, done = sse_data(reply.text)
    assert done == "[DONE]"
    *chunks, last = [json.loads(item) for item in data]
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 8
    assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
    for index, prompt in enumerate("ab"):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["text"] == prompt
        assert mine[0]["logprobs"]["tokens"] == ["<s>", prompt]
        assert "".join(c["text"] for c in mine) == f"{prompt}{prompt}!"
        offsets = [o for c in mine if c["logprobs"] for o in c["logprobs"]["text_offset"]]
        assert offsets == [0, 0, 1, 2]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
        assert mine[-1]["text"] == ""


async def test_a_suffix_goes_to_models_that_fill_gaps_and_to_no_others(called: World) -> None:
    refused = await complete(called, prompt="a", suffix="b")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")
    await called.publish(route(called.worker, supports_fill_in_middle=True))
    assert (await complete(called, prompt="a", suffix="b")).status_code == 200
    assert called.worker.requests[0].suffix == "b"
    for fields, param in (({"prompt": [1]}, "suffix"), ({"prompt": "a", "echo": True}, "echo")):
        refused = await complete(called, suffix="b", **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 16}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": "a" * (8192 * 256 + 1)}, "prompt"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(called: World, fields: dict[str, Any], param: str) -> None:
    reply = await complete(called, **fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert called.worker.requests == []


async def test_an_embedding_model_writes_no_text(called: World) -> None:
    embedder = route(called.worker)
    embedder.engine = lifecycle_pb2.ENGINE_KIND_EMBEDDING
    await called.publish(embedder)
    assert (await complete(called, prompt="a")).json()["error"]["param"] == "model"


def test_tokens_are_laid_along_a_text_that_comes_late_or_lacks_them() -> None:
    offsets = TextOffsets()
    assert [offsets.place(token) for token in (b"ab", b"\xc3", b"\xa9")] == [0, 2, 2]
    offsets.extend("abéx")
    assert [offsets.place(token) for token in (b"</s>", b" x", b"<end>")] == [3, 3, 4]
    assert token_text(b"\xe2\x80") == "bytes:\\xe2\\x80"

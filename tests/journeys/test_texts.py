"""Completions, embeddings, rerank and tokens through the real server, as their clients send them."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from tests.journeys.server import Server, Servers
from tests.journeys.test_clients import NODE_CACHE, OPENAI_NODE
from tests.models.tiny_encoders import tiny_cross_encoder

pytestmark = [pytest.mark.journey, pytest.mark.real_model, pytest.mark.timeout(300)]

WRITER, EMBEDDER = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
CONFIG = """\
gateways: 1
models:
  - name: {writer}
    preload: true
  - name: {embedder}
    preload: true
  - name: tiny-ranker
    source: {ranker}
"""
TEXTS = ["A cat sits on the mat.", "A kitten is on a rug.", "Shares fell sharply on Monday."]


@pytest.fixture(scope="module")
def texts_server(module_servers: Servers, tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Server:
    assert minilm.is_dir()
    ranker = tiny_cross_encoder(tmp_path_factory.mktemp("ranker") / "cross")
    return module_servers(config=CONFIG.format(writer=WRITER, embedder=EMBEDDER, ranker=ranker), ready_within_s=240)


@pytest.fixture
def client(texts_server: Server) -> OpenAI:
    return OpenAI(base_url=f"{texts_server.url}/v1", api_key="none")


def test_the_openai_sdk_embeds_texts_that_are_alike_alike(client: OpenAI) -> None:
    reply = client.embeddings.create(model=EMBEDDER, input=TEXTS)
    vectors = np.array([item.embedding for item in reply.data])
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.5 > likeness[0, 2]
    plain = client.embeddings.create(model=EMBEDDER, input=TEXTS[0], encoding_format="float", dimensions=64)
    short = vectors[0, :64] / np.linalg.norm(vectors[0, :64])
    assert np.array(plain.data[0].embedding) == pytest.approx(short, abs=1e-5)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 15


def test_what_is_too_long_or_of_another_kind_is_a_400_that_says_so(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.embeddings.create(model=EMBEDDER, input="word " * 400)
    assert caught.value.code == "context_length_exceeded"
    for model, ask in (
        (WRITER, lambda m: client.embeddings.create(model=m, input="a")),
        (EMBEDDER, lambda m: client.completions.create(model=m, prompt="a")),
        (EMBEDDER, lambda m: client.chat.completions.create(model=m, messages=[{"role": "user", "content": "a"}])),
    ):
        with pytest.raises(BadRequestError) as refused:
            ask(model)
        assert refused.value.param == "model"


def test_the_openai_sdk_completes_and_scores_a_prompt(client: OpenAI) -> None:
    prompt = "The capital of France is"
    reply = client.completions.create(model=WRITER, prompt=prompt, temperature=0, max_tokens=3, echo=True, logprobs=2)
    choice = reply.choices[0]
    assert choice.text.startswith(prompt)
    assert "Paris" in choice.text
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    # A likely sentence is likelier than the same words in disorder.
    scores = []
    for text in (prompt, "France capital is of The"):
        scored = client.completions.create(model=WRITER, prompt=text, max_tokens=0, echo=True, logprobs=0)
        lists = scored.choices[0].logprobs
        assert lists is not None
        assert lists.token_logprobs is not None
        scores.append(math.fsum(lists.token_logprobs[1:]))
    assert scores[0] > scores[1]


async def test_the_async_openai_sdk_streams_completions_of_several_prompts(texts_server: Server) -> None:
    async with AsyncOpenAI(base_url=texts_server.url, api_key="none") as client:
        whole = await client.completions.create(
            model=WRITER, prompt=["One, two, three,", "The capital of France is"], temperature=0, max_tokens=6
        )
        stream = await client.completions.create(
            model=WRITER,
            prompt=["One, two, three,", "The capital of France is"],
            temperature=0,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts, usage = {0: "", 1: ""}, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert [texts[0], texts[1]] == [choice.text for choice in whole.choices]
    assert usage is not None
    assert usage == whole.usage


def test_documents_are_ranked_by_a_cross_encoder_and_by_an_embedding_model(texts_server: Server) -> None:
    body = {"query": "Where is the kitten?", "documents": TEXTS, "top_n": 2, "return_documents": True}
    by_likeness = httpx.post(f"{texts_server.url}/v1/rerank", json={"model": EMBEDDER, **body}, timeout=60).json()
    assert by_likeness["results"][0]["index"] == 1
    assert by_likeness["results"][0]["document"] == {"text": TEXTS[1]}
    by_pairs = httpx.post(f"{texts_server.url}/rerank", json={"model": "tiny-ranker", **body}, timeout=90).json()
    scores = [item["relevance_score"] for item in by_pairs["results"]]
    assert len(scores) == 2
    assert 1 > scores[0] >= scores[1] > 0


def test_tokens_go_there_and_back(texts_server: Server) -> None:
    def post(path: str, **fields: object) -> dict[str, object]:
        reply: dict[str, object] = httpx.post(
            texts_server.url + path, json={"model": WRITER, **fields}, timeout=60
        ).json()
        return reply

    tokens = post("/tokenize", prompt="Grüße aus Köln")
    assert tokens["count"] == len(list(tokens["tokens"]))  # type: ignore[call-overload]
    assert tokens["max_model_len"] == 8192
    assert post("/v1/detokenize", tokens=tokens["tokens"]) == {"prompt": "Grüße aus Köln"}
    chat = post("/v1/tokenize", messages=[{"role": "user", "content": "hi"}])
    assert chat["count"] > 10  # type: ignore[operator]


def test_many_clients_embed_at_once_and_each_gets_its_own(texts_server: Server) -> None:
    with httpx.Client(base_url=texts_server.url, timeout=60) as http:

        def embed(text: str) -> list[float]:
            reply = http.post("/v1/embeddings", json={"model": EMBEDDER, "input": text})
            vector: list[float] = reply.json()["data"][0]["embedding"]
            return vector

        texts = [f"text number {n} " * (1 + n % 5) for n in range(48)]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(embed, texts))
        assert np.array(together[::12]) == pytest.approx(np.array([embed(t) for t in texts[::12]]), abs=1e-5)


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="node is not installed")
def test_openai_node_embeds_and_completes(texts_server: Server, client: OpenAI) -> None:
    NODE_CACHE.mkdir(parents=True, exist_ok=True)
    if not (NODE_CACHE / "node_modules" / "openai").is_dir():
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", OPENAI_NODE]
        subprocess.run(command, cwd=NODE_CACHE, check=True, timeout=200)
    script = NODE_CACHE / "embed.mjs"
    script.write_text(
        """
import OpenAI from "openai";
const [, , url, embedder, writer] = process.argv;
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none" });
const reply = await client.embeddings.create({ model: embedder, input: ["A cat sits on the mat."] });
const ask = { model: writer, prompt: "The capital of France is", temperature: 0, max_tokens: 3 };
let streamed = "";
for await (const chunk of await client.completions.create({ ...ask, stream: true })) streamed += chunk.choices[0].text;
console.log(JSON.stringify([reply.data[0].embedding, streamed]));
""",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["node", str(script), texts_server.url, EMBEDDER, WRITER],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    vector, streamed = json.loads(done.stdout)
    here = client.embeddings.create(model=EMBEDDER, input=[TEXTS[0]]).data[0].embedding
    assert np.array(vector) == pytest.approx(np.array(here), abs=1e-6)
    assert "Paris" in streamed

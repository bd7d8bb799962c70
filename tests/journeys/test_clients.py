"""Real clients against the real server with the real default model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.journeys.server import Server

pytestmark = [pytest.mark.journey, pytest.mark.real_model, pytest.mark.timeout(300)]

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
NODE_CACHE = Path.home() / ".cache" / "hostler" / "node"
OPENAI_NODE = "openai@6"


def test_the_openai_sdk_asks_and_is_answered(real_server: Server) -> None:
    client = OpenAI(base_url=f"{real_server.url}/v1", api_key="none")
    reply = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)  # type: ignore[arg-type]
    assert reply.choices[0].message.content == "The capital of France is Paris."
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert MODEL in [m.id for m in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_the_openai_sdk_streams(real_server: Server) -> None:
    client = OpenAI(base_url=real_server.url, api_key="none")
    chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True))  # type: ignore[call-overload]
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == "The capital of France is Paris."
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


async def test_the_async_openai_sdk_gets_logprobs_and_choices(real_server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
        reply = await client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            n=3,
            seed=4,
            max_tokens=6,
            logprobs=True,
            top_logprobs=2,  # type: ignore[arg-type]
        )
    assert [c.index for c in reply.choices] == [0, 1, 2]
    for choice in reply.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in choice.logprobs.content)


def test_the_same_seed_gives_the_same_text(real_server: Server) -> None:
    body = {"model": MODEL, "messages": QUESTION, "seed": 11, "temperature": 1.2, "max_tokens": 20}
    texts = {
        httpx.post(f"{real_server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"][
            "content"
        ]
        for _ in range(3)
    }
    assert len(texts) == 1


def test_curl_with_a_system_message_temperature_and_stream(real_server: Server) -> None:
    body = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "hello"},
        ],
        "temperature": 0.9,
        "max_tokens": 1000,
        "stream": True,
    }
    done = subprocess.run(
        [
            "curl",
            "-sN",
            f"{real_server.url}/v1/chat/completions",
            "-H",
            "Content-Type: application/json",
            "-d",
            json.dumps(body),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


def test_transformers_chat_holds_a_conversation(real_server: Server, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "chat",
        MODEL,
        real_server.url,
        "max_new_tokens=24",
        "do_sample=False",
    ]
    done = subprocess.run(
        command,
        input="What is the capital of France?\nWhat is two plus two?\n!exit\n",
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Paris" in done.stdout, done.stdout[-2000:]
    assert done.stdout.count(f"<{MODEL}>:") >= 2


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="node is not installed")
def test_openai_node_asks_and_streams(real_server: Server) -> None:
    NODE_CACHE.mkdir(parents=True, exist_ok=True)
    if not (NODE_CACHE / "node_modules" / "openai").is_dir():
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--silent", OPENAI_NODE],
            cwd=NODE_CACHE,
            check=True,
            timeout=200,
        )
    script = NODE_CACHE / "ask.mjs"
    script.write_text(
        """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none" });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ask = { model: process.argv[3], temperature: 0, messages };
const reply = await client.chat.completions.create(ask);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? "";
console.log(JSON.stringify([reply.choices[0].message.content, streamed]));
""",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["node", str(script), real_server.url, MODEL], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == ["The capital of France is Paris."] * 2

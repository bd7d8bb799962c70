"""/v1/responses as real clients use it, against the real server: the SDKs, agents, the AI SDK; and a killed process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.gateway.responses_schema import check_response, check_stream
from tests.journeys.server import Server, Servers, wait_until

pytestmark = [pytest.mark.journey, pytest.mark.timeout(600)]
real_model = pytest.mark.real_model
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="node is not installed"
)

MODEL = "SmolLM2-135M-Instruct"
CODER = "coder"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
NODE_CACHE = Path.home() / ".cache" / "hostler"
TWO_GATEWAYS = """\
models:
  - name: scripted
    engine: scripted
    preload: true
gateways: 2
"""


@pytest.fixture
def coder(coder_server: Server) -> Server:
    return coder_server


@real_model
def test_the_sync_sdk_asks_streams_and_continues(real_server: Server) -> None:
    client = OpenAI(base_url=f"{real_server.url}/v1", api_key="none")
    whole = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
    assert whole.output_text == ANSWER
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    counted = client.responses.input_tokens.count(model=MODEL, input=QUESTION)
    assert counted.input_tokens == whole.usage.input_tokens
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == streamed == ANSWER
    more = client.responses.create(
        model=MODEL, input="And of Italy?", temperature=0, previous_response_id=whole.id, max_output_tokens=12
    )
    assert more.usage is not None
    assert more.usage.input_tokens > whole.usage.total_tokens
    assert client.responses.retrieve(whole.id).output_text == ANSWER


@real_model
async def test_the_async_sdk_runs_in_the_background_and_resumes(real_server: Server) -> None:
    async with AsyncOpenAI(base_url=real_server.url, api_key="none") as client:
        queued = await client.responses.create(model=MODEL, input=QUESTION, temperature=0, background=True)
        assert queued.status == "queued"
        events = [event async for event in await client.responses.retrieve(queued.id, stream=True, starting_after=2)]
        assert events[-1].type == "response.completed"
        assert (await client.responses.retrieve(queued.id)).output_text == ANSWER
        incomplete = await client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=2)
        assert incomplete.status == "incomplete"
        assert incomplete.incomplete_details is not None
        assert incomplete.incomplete_details.reason == "max_output_tokens"


@real_model
def test_every_object_and_event_is_valid(real_server: Server) -> None:
    body = {"model": MODEL, "input": QUESTION, "temperature": 0}
    with_logprobs = {**body, "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    for asked in (body, with_logprobs):
        reply = httpx.post(f"{real_server.url}/v1/responses", json=asked, timeout=60)
        check_response(reply.json())
        streamed = httpx.post(f"{real_server.url}/v1/responses", json={**asked, "stream": True}, timeout=60)
        part = check_stream(streamed.text)[-1]["response"]["output"][0]["content"][0]
        assert part["text"] == ANSWER
    assert "".join(token["token"] for token in part["logprobs"]).startswith("The capital")


@real_model
def test_truncation_makes_a_long_conversation_fit_the_real_context(real_server: Server) -> None:
    turns: list[dict[str, Any]] = []
    for _ in range(12):
        turns += [{"role": "user", "content": "word " * 900}, {"role": "assistant", "content": "ok"}]
    turns.append({"role": "user", "content": QUESTION})
    body = {"model": MODEL, "input": turns, "temperature": 0, "max_output_tokens": 16}
    refused = httpx.post(f"{real_server.url}/v1/responses", json=body, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    fitted = httpx.post(f"{real_server.url}/v1/responses", json={**body, "truncation": "auto"}, timeout=200)
    response = check_response(fitted.json())
    assert 900 < response["usage"]["input_tokens"] < 8192


@real_model
def test_structured_output_is_parsed_by_the_sdk(coder: Server) -> None:
    class Capital(BaseModel):
        city: str
        country: str

    client = OpenAI(base_url=f"{coder.url}/v1", api_key="none", timeout=300)
    asked = "The capital of France, as JSON with city and country."
    reply = client.responses.parse(model=CODER, input=asked, text_format=Capital, temperature=0, max_output_tokens=60)
    assert reply.output_parsed is not None
    assert "Paris" in reply.output_parsed.city


@real_model
def test_a_custom_tool_is_called_with_plain_text(coder: Server) -> None:
    body = {
        "model": CODER,
        "input": "Run the shell command ls.",
        "tools": [{"type": "custom", "name": "shell", "description": "Runs a shell command, given as plain text."}],
        "tool_choice": {"type": "custom", "name": "shell"},
        "temperature": 0,
        "max_output_tokens": 80,
        "stream": True,
    }
    reply = httpx.post(f"{coder.url}/v1/responses", json=body, timeout=300)
    (call,) = check_stream(reply.text)[-1]["response"]["output"]
    assert (call["type"], call["name"]) == ("custom_tool_call", "shell")
    assert "ls" in call["input"]
    assert not call["input"].startswith("{")


@real_model
def test_openai_agents_call_a_tool_send_its_result_and_get_an_answer(coder: Server) -> None:
    agents = pytest.importorskip("agents")
    asked: list[str] = []

    @agents.function_tool  # type: ignore[untyped-decorator]
    def get_weather(city: str) -> str:
        """Get the current weather of a city."""
        asked.append(city)
        return "31 degrees and a thunderstorm"

    async def run() -> tuple[list[str], list[str]]:
        agents.set_tracing_disabled(True)
        client = AsyncOpenAI(base_url=f"{coder.url}/v1", api_key="none", timeout=300)
        model = agents.OpenAIResponsesModel(model=CODER, openai_client=client)
        settings = agents.ModelSettings(
            temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False
        )
        agent = agents.Agent(name="weather", model=model, tools=[get_weather], model_settings=settings)
        result = await agents.Runner.run(agent, "What is the weather in Paris right now?", max_turns=4)
        streamed = agents.Runner.run_streamed(agent, "What is the weather in Rome right now?", max_turns=4)
        async for _ in streamed.stream_events():
            pass
        return [item.type for item in result.new_items], [item.type for item in streamed.new_items]

    whole, streamed = asyncio.run(run())
    assert ["paris" in asked[0].lower(), "rome" in asked[1].lower()] == [True, True]
    assert whole == streamed == ["tool_call_item", "tool_call_output_item", "message_output_item"]


@real_model
@needs_node
def test_openai_node_asks_streams_and_follows(real_server: Server) -> None:
    script = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none" });
const ask = { model: process.argv[3], temperature: 0, input: "What is the capital of France?" };
const whole = await client.responses.create(ask);
let streamed = "";
for await (const event of await client.responses.create({ ...ask, stream: true }))
  if (event.type === "response.output_text.delta") streamed += event.delta;
const helper = client.responses.stream(ask);
const final = await helper.finalResponse();
const queued = await client.responses.create({ ...ask, background: true });
let last = "";
for await (const event of await client.responses.retrieve(queued.id, { stream: true, starting_after: 1 }))
  last = event.type;
console.log(JSON.stringify([whole.output_text, streamed, final.output_text, queued.status, last]));
"""
    said = run_node("node", ["openai@6"], script, real_server.url, MODEL)
    assert said == [ANSWER, ANSWER, ANSWER, "queued", "response.completed"]


@real_model
@needs_node
def test_the_ai_sdk_streams_and_continues_with_references_to_stored_items(real_server: Server) -> None:
    script = """
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";
const openai = createOpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none" });
const model = openai(process.argv[3]);
const messages = [{ role: "user", content: "What is the capital of France?" }];
const whole = await generateText({ model, temperature: 0, messages });
let text = "";
const stream = streamText({ model, temperature: 0, messages });
for await (const piece of stream.textStream) text += piece;
const more = [...messages, ...whole.response.messages, { role: "user", content: "And of Italy?" }];
const next = await generateText({ model, temperature: 0, messages: more, maxOutputTokens: 12 });
const references = (next.request.body.input ?? []).filter(item => item.type === "item_reference").length;
console.log(JSON.stringify([whole.text, text, await stream.finishReason, next.text.length > 0, references]));
"""
    said = run_node("node-ai", ["ai@6", "@ai-sdk/openai@3"], script, real_server.url, MODEL)
    assert said == [ANSWER, ANSWER, "stop", True, 1]


def run_node(cache: str, packages: list[str], script: str, *args: str) -> list[Any]:
    """Run a module with npm packages that are installed once; return the JSON that it prints."""
    directory = NODE_CACHE / cache
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [package.rpartition("@")[0] for package in packages]
    if not all((directory / "node_modules" / name).is_dir() for name in wanted):
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", *packages]
        subprocess.run(command, cwd=directory, check=True, timeout=200)
    path = directory / "responses.mjs"
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(
        ["node", str(path), *args], capture_output=True, text=True, timeout=200, check=False, cwd=directory
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: list[Any] = json.loads(done.stdout)
    return result


def test_a_killed_gateway_leaves_its_background_response_failed_and_the_store_whole(hostler_server: Servers) -> None:
    server = hostler_server(config=TWO_GATEWAYS)
    url = f"{server.url}/v1/responses"
    kept = httpx.post(url, json={"model": "scripted", "input": "keep me"}, timeout=30).json()
    slow = "wait [[tokens=2000]] [[delay_ms=50]]"
    running = httpx.post(url, json={"model": "scripted", "input": slow, "background": True}, timeout=30).json()

    def status() -> str:
        # Each on a connection of its own, so that either gateway answers.
        return str(httpx.get(f"{url}/{running['id']}", timeout=30).json()["status"])

    wait_until(lambda: status() == "in_progress", 20, "in progress")
    os.kill(holder_of(running["id"], server), signal.SIGKILL)
    wait_until(lambda: status_or_none(url, running["id"]) == "failed", 20, "failed")
    assert httpx.get(f"{url}/{kept['id']}", timeout=30).json() == kept
    followed = httpx.get(f"{url}/{running['id']}", params={"stream": "true"}, timeout=30)
    assert check_stream(followed.text)[-1]["type"] == "response.failed"
    more = {"model": "scripted", "input": "more", "previous_response_id": kept["id"]}
    assert httpx.post(url, json=more, timeout=30).status_code == 200


def holder_of(response_id: str, server: Server) -> int:
    """Return the gateway that works on a response: it holds the lock of the runner that the store names."""
    with sqlite3.connect(f"file:{server.run_dir / 'responses.db'}?mode=ro", uri=True) as connection:
        ((name,),) = connection.execute("SELECT runner FROM records WHERE id = ?", (response_id,)).fetchall()
    for pid in server.pids("gateway"):
        if any(file.path.endswith(f"runner-{name}") for file in psutil.Process(pid).open_files()):
            return pid
    raise AssertionError("no gateway holds the response")


def status_or_none(url: str, response_id: str) -> str | None:
    try:
        return str(httpx.get(f"{url}/{response_id}", timeout=30).json()["status"])
    except httpx.HTTPError:
        return None  # the killed gateway's connections are reset

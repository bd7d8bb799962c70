"""MCP through the whole server: agents that hostler runs, agents of others, and hostler as somebody's tool."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters

from tests.gateway.responses_schema import check_response, check_stream
from tests.journeys.server import HOSTLER, ROOT, Server, Servers, free_port, wait_until

pytestmark = [pytest.mark.journey, pytest.mark.real_model, pytest.mark.timeout(600)]

PROGRAM = ROOT / "tests" / "gateway" / "mcp_program.py"
CACHE = Path.home() / ".cache" / "hostler"
TINY_AGENTS = "@huggingface/tiny-agents@0.3.4"
SCRIPT = 'Please [[call find_order {"customer": "Ada"}]] and [[call get_price {"order_id": "A-17"}]].'
RESULTS = "The order id of Ada is A-17. | The order A-17 costs 129 euros."
TOOL: dict[str, Any] = {
    "type": "mcp",
    "server_label": "shop",
    "require_approval": "never",
    "allowed_tools": ["find_order", "get_price"],
}

PYTHON_AGENT = """
import asyncio, functools, json, sys
from huggingface_hub.inference._mcp.agent import Agent

async def main(url, server):
    prompt = "You help people with their orders."
    async with Agent(model="coder", base_url=url, api_key="unused", servers=[server], prompt=prompt) as agent:
        await agent.load_tools()
        # The client sets no temperature; a test wants the same words each time.
        agent.client.chat_completion = functools.partial(agent.client.chat_completion, temperature=0)
        run = agent.run("Find the order id of the customer Ada.")
        async for item in run:
            if getattr(item, "role", None) == "tool":
                print(json.dumps([item.name, item.content]))
                break
        await run.aclose()

asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
"""

NODE_AGENT = """
import { Agent } from "@huggingface/tiny-agents";
const [url, { type, ...config }] = [process.argv[2], JSON.parse(process.argv[3])];
// The client sets no temperature; a test wants the same words each time.
const fetched = globalThis.fetch;
globalThis.fetch = (address, init) => {
  if (String(address).endsWith("/chat/completions")) {
    init.body = JSON.stringify({ ...JSON.parse(init.body), temperature: 0 });
  }
  return fetched(address, init);
};
const prompt = "You help people with their orders.";
const agent = new Agent({ endpointUrl: url, model: "coder", apiKey: "unused", servers: [{ type, config }], prompt });
await agent.loadTools();
for await (const item of agent.run("Find the order id of the customer Ada.")) {
  if (item.role === "tool") {
    console.log(JSON.stringify([item.name, item.content]));
    break;
  }
}
process.exit(0);
"""


@pytest.fixture(scope="module")
def agents(module_servers: Servers, qwen_coder: Path) -> Iterator[Server]:
    """A server of the coder and of the scripted model, with an MCP server over stdio."""
    config = f"""
models:
  - {{name: coder, source: {qwen_coder}, preload: true}}
  - {{name: scripted, engine: scripted, preload: true}}
gateways: 1
mcp_servers:
  shop: {{command: [{sys.executable}, {PROGRAM}, stdio]}}
"""
    server = module_servers(config=config, ready_within_s=400)
    wait_until(lambda: server.is_ready("coder") and server.is_ready("scripted"), 400, "both models")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def shop_over_sse() -> Iterator[str]:
    """The same MCP server, as one that listens."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(PROGRAM), "sse", str(port)], stderr=subprocess.DEVNULL)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, 60, "the MCP server")
        yield f"http://127.0.0.1:{port}/sse"
    finally:
        process.terminate()
        process.wait(10)


def test_one_request_makes_the_calls_that_its_answer_needs(agents: Server) -> None:
    body = {"model": "scripted", "input": SCRIPT, "tools": [TOOL], "stream": True}
    reply = httpx.post(f"{agents.url}/v1/responses", json=body, timeout=120)
    response = check_stream(reply.text)[-1]["response"]
    kinds = [item["type"] for item in response["output"]]
    assert kinds == ["mcp_list_tools", "mcp_call", "mcp_call", "message"]
    assert response["output"][3]["content"][0]["text"] == RESULTS
    with openai.OpenAI(base_url=f"{agents.url}/v1", api_key="unused", timeout=120) as client:
        stream = client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": SCRIPT}],
            stream=True,
            extra_body={"mcp_servers": ["shop"]},
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == RESULTS


def test_a_real_model_finds_its_way_through_two_tools(agents: Server) -> None:
    body = {
        "model": "coder",
        "input": "How much does Ada's order cost? Find her order, then its price.",
        "instructions": "Never repeat a call. After a result, call the next tool, or answer.",
        "tools": [TOOL],
        "temperature": 0,
        "frequency_penalty": 0.4,
        "parallel_tool_calls": False,
        "max_tool_calls": 2,
        "max_output_tokens": 100,
    }
    response = check_response(httpx.post(f"{agents.url}/v1/responses", json=body, timeout=300).json())
    calls = [(item["name"], item["output"]) for item in response["output"] if item["type"] == "mcp_call"]
    assert calls == [
        ("find_order", "The order id of Ada is A-17."),
        ("get_price", "The order A-17 costs 129 euros."),
    ]
    assert response["status"] == "completed"


def test_a_killed_mcp_server_is_started_again_and_leaves_with_the_gateway(agents: Server) -> None:
    tried = agents.hostler("mcp", "test", "shop", "--port", str(agents.port))
    assert "shop: connected (over stdio" in tried.stdout, tried.stderr
    assert "get_price (read only)" in tried.stdout
    (old,) = programs()
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: old not in programs(), 10, "gone")
    again = agents.hostler("mcp", "test", "shop", "--port", str(agents.port))
    assert again.returncode == 0, again.stderr
    (new,) = programs()
    listed = agents.hostler("mcp", "list", "--port", str(agents.port), "--json")
    assert [server["state"] for server in json.loads(listed.stdout)] == ["connected"]
    (gateway,) = agents.pids("-m", "gateway")
    os.kill(gateway, signal.SIGKILL)
    wait_until(lambda: new not in programs(), 20, "the orphan's end")
    wait_until(agents.is_ready, 60, "the next gateway")


def programs() -> list[int]:
    """Return the pids of MCP servers over stdio that a gateway started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[1:] == [str(PROGRAM), "stdio"]:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


async def test_hostler_itself_is_an_mcp_server(agents: Server) -> None:
    command = StdioServerParameters(
        command=str(HOSTLER), args=["mcp", "serve", "--port", str(agents.port)], env=agents.environment()
    )
    async with Client(command) as client:
        listed = await client.call_tool("list_models", {})
        assert listed.structured_content is not None
        states = {model["name"]: model["state"] for model in listed.structured_content["result"]}
        assert states["coder"] == states["scripted"] == "ready"
        answer = await client.call_tool("ask_model", {"model": "scripted", "prompt": "hello [[tokens=3]]"})
        assert not answer.is_error
        assert len(answer.structured_content["result"].split()) == 3  # type: ignore[index]


def server_config(kind: str, url: str) -> str:
    stdio = {"type": "stdio", "command": sys.executable, "args": [str(PROGRAM), "stdio"]}
    return json.dumps(stdio if kind == "stdio" else {"type": "sse", "url": url})


@pytest.mark.parametrize("kind", ["stdio", "sse"])
def test_tiny_agents_in_python_use_their_tools_through_a_real_model(
    agents: Server, shop_over_sse: str, kind: str
) -> None:
    packages = CACHE / "python-tiny-agents"
    if not (packages / "mcp").is_dir():
        # This client speaks the first version of the mcp package, so it has its own directory.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
        subprocess.run([*pip, "huggingface_hub>=1.5", "mcp>=1.8,<2"], check=True, timeout=300)
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", PYTHON_AGENT, f"{agents.url}/v1", server_config(kind, shop_over_sse)],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == ["find_order", "The order id of Ada is A-17."]


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="node is not installed")
@pytest.mark.parametrize("kind", ["stdio", "sse"])
def test_tiny_agents_in_node_use_their_tools_through_a_real_model(
    agents: Server, shop_over_sse: str, kind: str
) -> None:
    directory = CACHE / "node-tiny-agents"
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "node_modules" / "@huggingface" / "tiny-agents").is_dir():
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--ignore-scripts", TINY_AGENTS]
        subprocess.run(command, cwd=directory, check=True, timeout=200)
    (directory / "agent.mjs").write_text(NODE_AGENT, encoding="utf-8")
    done = subprocess.run(
        ["node", "agent.mjs", f"{agents.url}/v1", server_config(kind, shop_over_sse)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == ["find_order", "The order id of Ada is A-17."]

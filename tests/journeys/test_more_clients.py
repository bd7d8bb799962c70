"""What `hostler connect` prints and writes, given to the clients themselves; and what the doctor says of a live server.

The Python clients live in an environment of their own under ~/.cache/hostler, so that they bring nothing into ours.
Codex, opencode and Continue are half a gigabyte: HOSTLER_TEST_CLIENTS=1 fetches and runs them, too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.bench.environments import Environment, clean_environment
from tests.journeys.server import Server

pytestmark = [pytest.mark.journey, pytest.mark.timeout(600)]

MODEL = "SmolLM2-135M-Instruct"
ANSWER = "The capital of France is Paris."
CACHE = Path.home() / ".cache" / "hostler"
RECIPE = "huggingface_hub>=2 langchain-openai>=1.7 llm>=0.36 openai>=3 pydantic-ai-slim[openai]>=2.60"
PYTHON_CLIENTS = ("openai-python", "langchain", "pydantic-ai", "huggingface-hub")
NODE_PACKAGES = ("ai", "@ai-sdk/openai-compatible", "openai@6")
CODING_PACKAGES = ("@openai/codex", "opencode-ai", "@continuedev/cli")
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="node is not installed"
)


@pytest.fixture(scope="session")
def clients() -> Environment:
    """An environment that holds the Python clients, built once."""
    environment = Environment("clients", CACHE)

    def build() -> None:
        environment.make_venv()
        environment.pip(*RECIPE.split())

    environment.ensure(RECIPE, build, print, "building the clients' environment")
    return environment


def npm_install(name: str, packages: tuple[str, ...]) -> Path:
    """Return a directory that holds npm packages, installed once."""
    directory = CACHE / name
    stamp = directory / "ready"
    if not (stamp.is_file() and stamp.read_text() == " ".join(packages)):
        directory.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", *packages]
        subprocess.run(command, cwd=directory, check=True, timeout=400)
        stamp.write_text(" ".join(packages))
    return directory


def connect(server: Server, *args: str) -> Any:
    """Run `hostler connect` in this process, against a server."""
    result = CliRunner().invoke(app, ["connect", *args, "--url", server.url])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in args else result.stdout


def program(server: Server, client: str) -> str:
    return str(connect(server, client, "--json")["snippet"]["text"])


def finished(processes: dict[str, subprocess.Popen[str]]) -> dict[str, str]:
    """Return what each of several programs printed; they run at the same time."""
    printed = {}
    for name, process in processes.items():
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {error[-2000:]}"
        printed[name] = out
    return printed


def start(*command: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=env or clean_environment(), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    )


def is_scripted(text: str) -> bool:
    """Return whether a text is the scripted model's: words with their numbers."""
    return bool(re.match(r"\s*\w+0( \w+\d+)+\s*$", text))


def test_the_program_that_connect_prints_runs_and_prints_the_answer(
    scripted_server: Server, clients: Environment, tmp_path: Path
) -> None:
    running = {
        name: start(str(clients.python), "-c", program(scripted_server, name), cwd=tmp_path) for name in PYTHON_CLIENTS
    }
    running["curl"] = start("bash", "-c", program(scripted_server, "curl"), cwd=tmp_path)
    printed = finished(running)
    printed["curl"] = json.loads(printed["curl"])["choices"][0]["message"]["content"]
    assert {name: text for name, text in printed.items() if not is_scripted(text)} == {}


@needs_node
def test_the_program_for_node_that_connect_prints_runs_and_prints_the_answer(scripted_server: Server) -> None:
    directory = npm_install("connect-node", NODE_PACKAGES)
    running = {}
    for name in ("openai-node", "ai-sdk"):
        path = directory / f"{name}.mjs"
        path.write_text(program(scripted_server, name), encoding="utf-8")
        running[name] = start("node", str(path), cwd=directory)
    assert {name: text for name, text in finished(running).items() if not is_scripted(text)} == {}


def test_llm_reads_what_connect_writes_and_answers(
    scripted_server: Server, clients: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    connect(scripted_server, "llm", "--write")
    llm = str(clients.directory / "bin/llm")
    for options in ([], ["--no-stream"]):  # one after the other: it migrates its own database
        printed = finished({"llm": start(llm, "-m", "hostler/scripted", *options, "hello", cwd=tmp_path)})
        assert is_scripted(printed["llm"]), printed


LIBRARIES = {
    "langchain": """
from langchain_openai import ChatOpenAI
model = ChatOpenAI(base_url=BASE, api_key="unused", model=MODEL, temperature=0)
print(json.dumps([model.invoke(QUESTION).content, "".join(chunk.content for chunk in model.stream(QUESTION))]))
""",
    "pydantic-ai": """
import asyncio
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
provider = OpenAIProvider(base_url=BASE, api_key="unused")
async def ask():
    chat = Agent(OpenAIChatModel(MODEL, provider=provider), model_settings={"temperature": 0})
    responses = Agent(OpenAIResponsesModel(MODEL, provider=provider), model_settings={"temperature": 0})
    async with chat.run_stream(QUESTION) as stream:
        streamed = await stream.get_output()
    return [(await chat.run(QUESTION)).output, streamed, (await responses.run(QUESTION)).output]
print(json.dumps(asyncio.run(ask())))
""",
    "huggingface-hub": """
from huggingface_hub import InferenceClient
client = InferenceClient(base_url=BASE, api_key="unused")
ask = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
whole = client.chat.completions.create(**ask).choices[0].message.content
chunks = client.chat.completions.create(**ask, stream=True)
print(json.dumps([whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)]))
""",
}


@pytest.mark.real_model
def test_a_library_asks_and_streams(real_server: Server, clients: Environment, tmp_path: Path) -> None:
    opening = f"import json\nBASE, MODEL = {real_server.url + '/v1'!r}, {MODEL!r}\n"
    opening += "QUESTION = 'What is the capital of France?'\n"
    running = {name: start(str(clients.python), "-c", opening + text, cwd=tmp_path) for name, text in LIBRARIES.items()}
    answers = {name: json.loads(text.splitlines()[-1]) for name, text in finished(running).items()}
    assert answers == {"langchain": [ANSWER] * 2, "pydantic-ai": [ANSWER] * 3, "huggingface-hub": [ANSWER] * 2}


@pytest.mark.real_model
def test_the_doctor_says_which_clients_would_work_and_why_not(scripted_server: Server, real_server: Server) -> None:
    for client in ("codex", "claude-code"):
        works = scripted_server.hostler("doctor", "--client", client)
        assert (works.returncode, f"{client} works with scripted" in works.stdout) == (0, True), works.stdout
    broken = real_server.hostler("doctor", "--client", "zed")
    assert broken.returncode == 1, broken.stdout
    assert "it sends tools, and the model takes none" in broken.stdout


def test_the_doctor_finds_the_server_that_runs_with_nothing_open_to_others(scripted_server: Server) -> None:
    told = scripted_server.hostler("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(told.stdout)["findings"]}
    assert findings[f"server on :{scripted_server.port}"]["state"] == "ok"
    assert "scripted" in findings[f"server on :{scripted_server.port}"]["detail"]
    assert findings[f"sockets of :{scripted_server.port}"]["state"] == "ok", findings
    assert findings["run directories"]["state"] == "ok"


@needs_node
@pytest.mark.skipif(os.environ.get("HOSTLER_TEST_CLIENTS") != "1", reason="half a gigabyte; HOSTLER_TEST_CLIENTS=1")
def test_coding_agents_read_what_connect_writes_and_reach_the_server(
    scripted_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_directory = npm_install("coding-clients", CODING_PACKAGES) / "node_modules/.bin"
    home = tmp_path / "home"
    home.mkdir()
    for variable in ("CODEX_HOME", "XDG_CONFIG_HOME", "CONTINUE_GLOBAL_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    for name in ("codex", "opencode", "continue"):
        connect(scripted_server, name, "--write")
    environment = clean_environment(HOME=str(home))
    asked = {
        "codex": ["codex", "exec", "--profile", "hostler", "--skip-git-repo-check", "say hello"],
        "opencode": ["opencode", "run", "--model", "hostler/scripted", "say hello"],
        "continue": ["cn", "--config", str(home / ".continue/config.yaml"), "-p", "say hello"],
    }
    for name, (command, *arguments) in asked.items():
        process = start(str(bin_directory / command), *arguments, cwd=tmp_path, env=environment)
        out, error = process.communicate(timeout=120)
        assert re.search(r"\w+0 \w+1 \w+2", out + error), f"{name}: {(out + error)[-2000:]}"

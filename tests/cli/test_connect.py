"""`hostler connect`: what is shown and written for each client, and what of the user's is never touched."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.clients import catalog, jsonc, merge, render
from cli.clients.client import Entry
from cli.clients.render import Target
from cli.main import app
from tests.cli.fakes import FakeHttp, FakeServer, sse

HERE = Target(root="http://127.0.0.1:8000", model="tiny", key="unused", has_key=False, context_tokens=4096)
LOCKED = Target(root="https://box.example.org", model="org/big:q4", key="YOUR_KEY", has_key=True, context_tokens=4096)
KEY = "correct-horse-battery"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("CODEX_HOME", "CLAUDE_CONFIG_DIR", "XDG_CONFIG_HOME", "LLM_USER_PATH", "CONTINUE_GLOBAL_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("HOSTLER_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def http(home: Path) -> Any:
    server = FakeHttp(lambda body: sse("hello"))
    yield server
    server.close()


Run = Callable[..., Any]


@pytest.fixture
def run(http: FakeHttp) -> Run:
    def invoke(*args: str, url: str | None = None) -> Any:
        return CliRunner().invoke(app, ["connect", *args, "--url", url or http.url])

    return invoke


def test_without_a_name_every_client_is_listed() -> None:
    listed = json.loads(CliRunner().invoke(app, ["connect", "--json"]).stdout)
    assert [client["name"] for client in listed] == catalog.names()
    wanted = {"jan", "open-webui", "cursor", "codex", "claude-code", "continue", "cline", "aider", "opencode", "zed"}
    wanted |= {"tiny-agents", "langchain", "llm", "openai-python", "openai-node", "ai-sdk", "pydantic-ai", "curl"}
    assert wanted <= set(catalog.names())


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("target", [HERE, LOCKED], ids=["without a key", "with a key"])
def test_no_mark_is_left_unfilled_and_the_server_and_model_are_named(name: str, target: Target) -> None:
    client = catalog.find(name)
    texts = [merge.merged("", file.format, render.entries_of(file, target)) for file in client.files]
    texts += [step.text for step in render.steps_of(client, target)]
    texts += [render.fill(client.snippet.text, target)] if client.snippet else []
    whole = "\n".join(texts)
    assert not [mark for mark in target.marks() if mark in whole]
    assert target.root in whole
    assert target.model in whole


def test_the_model_is_the_first_that_the_server_lists_unless_one_is_named(run: Run) -> None:
    assert json.loads(run("curl", "--json").stdout)["model"] == "tiny"
    assert json.loads(run("curl", "--json", "--model", "other").stdout)["model"] == "other"
    unknown = run("curl", "--model", "gpt-9")
    assert unknown.exit_code == 1
    assert "serves no model 'gpt-9'; it has tiny, other" in unknown.stderr


def test_the_server_that_runs_here_is_found_and_models_that_do_not_chat_are_passed_over(home: Path) -> None:
    models = ({"id": "ears", "task": "automatic-speech-recognition"}, {"id": "other"})
    http = FakeHttp(lambda body: sse("hello"), models=models)
    server = FakeServer(int(http.url.rsplit(":", 1)[1]), {"host": "127.0.0.1", "api_key": KEY})
    try:
        said = json.loads(CliRunner().invoke(app, ["connect", "codex", "--json"]).stdout)
        told = CliRunner().invoke(app, ["connect", "codex", "--json", "--with-key"]).stdout
    finally:
        server.close()
        http.close()
    assert (said["base_url"], said["model"]) == (f"{http.url}/v1", "other")
    assert said["environment"] == {"HOSTLER_API_KEY": "YOUR_KEY"}
    assert tomllib.loads(said["files"][0]["text"])["model_providers"]["hostler"]["env_key"] == "HOSTLER_API_KEY"
    assert KEY not in json.dumps(said)
    assert json.loads(told)["environment"] == {"HOSTLER_API_KEY": KEY}


def test_a_reply_that_may_be_long_leaves_room_for_the_prompt(run: Run) -> None:
    entry = json.loads(json.loads(run("opencode", "--json").stdout)["files"][0]["text"])
    limit = entry["provider"]["hostler"]["models"]["tiny"]["limit"]
    assert limit == {"context": 8192, "output": 2048}


def test_an_unknown_client_is_told_which_name_is_near(run: Run) -> None:
    result = run("claude")
    assert result.exit_code == 2
    assert "did you mean 'claude-code'?" in result.stderr


def test_what_has_no_file_cannot_be_written(run: Run) -> None:
    result = run("cursor", "--write")
    assert result.exit_code == 2
    assert "only itself can write" in result.stderr


def test_cursor_is_told_that_it_needs_a_public_address(run: Run) -> None:
    assert "cannot reach http://127.0.0.1" in run("cursor").stdout


def test_codex_gets_a_profile_of_its_own_and_its_configuration_stays(run: Run, home: Path, http: FakeHttp) -> None:
    (home / ".codex").mkdir(parents=True)
    (home / ".codex/config.toml").write_text('model = "gpt-5"\n')
    result = run("codex", "--write")
    assert result.exit_code == 0, result.output
    written = tomllib.loads((home / ".codex/hostler.config.toml").read_text())
    assert written["model_providers"]["hostler"]["base_url"] == f"{http.url}/v1"
    assert written["model_providers"]["hostler"]["wire_api"] == "responses"
    assert (home / ".codex/config.toml").read_text() == 'model = "gpt-5"\n'
    assert (home / ".codex/hostler.config.toml").stat().st_mode & 0o777 == 0o600
    assert "is already so" in run("codex", "--write").stdout


CONTINUE = """\
# mine
name: Mine
version: 2.0.0
schema: v1
models:
  - name: other # keep
    provider: ollama
    model: llama
"""


def test_continue_keeps_other_models_comments_and_a_backup(run: Run, home: Path) -> None:
    path = home / ".continue/config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(CONTINUE)
    result = run("continue", "--write")
    assert result.exit_code == 0, result.output
    assert "+  - name: hostler" in result.stdout
    after = path.read_text()
    assert after.startswith(CONTINUE)
    assert [model["name"] for model in yaml.safe_load(after)["models"]] == ["other", "hostler"]
    (backup,) = path.parent.glob("config.yaml.before-hostler-*")
    assert backup.read_text() == CONTINUE
    assert run("continue", "--write", "--model", "other").exit_code == 0
    models = yaml.safe_load(path.read_text())["models"]
    assert [(model["name"], model["model"]) for model in models] == [("other", "llama"), ("hostler", "other")]


def test_aider_s_own_choice_of_model_is_not_replaced(run: Run, home: Path) -> None:
    path = home / ".aider.conf.yml"
    path.parent.mkdir(parents=True)
    path.write_text("model: sonnet\nauto-commits: false\n")
    result = run("aider", "--write")
    assert result.exit_code == 1
    assert "model is 'sonnet'; for hostler it must be 'openai/tiny'" in result.stderr
    assert path.read_text() == "model: sonnet\nauto-commits: false\n"
    assert [file.name for file in home.iterdir()] == [".aider.conf.yml"]


ZED = """\
// Zed settings
{
  "theme": "One Dark", // dark
  "language_models": { /* none yet */ },
  "vim_mode": true,
}
"""


def test_zed_s_comments_and_settings_stay(run: Run, home: Path, http: FakeHttp) -> None:
    path = home / ".config/zed/settings.json"
    path.parent.mkdir(parents=True)
    path.write_text(ZED)
    assert run("zed", "--write").exit_code == 0
    after = path.read_text()
    for line in ("// Zed settings", '"theme": "One Dark", // dark', "/* none yet */", '"vim_mode": true,'):
        assert line in after
    provider = jsonc.read(after).value["language_models"]["openai_compatible"]["hostler"]
    assert provider["api_url"] == f"{http.url}/v1"
    assert provider["available_models"][0]["name"] == "tiny"


def test_a_file_that_cannot_be_read_is_left_alone(run: Run, home: Path) -> None:
    path = home / ".config/opencode/opencode.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"provider": ')
    result = run("opencode", "--write")
    assert result.exit_code == 1
    assert "is left as it is" in result.stderr
    assert path.read_text() == '{"provider": '


def test_a_link_stays_a_link(run: Run, home: Path, tmp_path: Path) -> None:
    (home / ".config/opencode").mkdir(parents=True)
    kept = tmp_path / "dotfiles.jsonc"
    kept.write_text('{\n  "theme": "nord"\n}\n')
    link = home / ".config/opencode/opencode.jsonc"
    link.symlink_to(kept)
    assert run("opencode", "--write").exit_code == 0
    assert link.is_symlink()
    assert json.loads(kept.read_text())["theme"] == "nord"
    assert "hostler" in json.loads(kept.read_text())["provider"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


_PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3)
_DOCUMENTS = st.dictionaries(st.sampled_from("abc"), _JSON, max_size=3)


@given(document=_DOCUMENTS, path=_PATHS, value=_JSON, indent=st.sampled_from([None, 2]))
def test_putting_a_value_into_json_changes_nothing_else(
    document: Any, path: list[str], value: Any, indent: int | None
) -> None:
    text = "// first\n" + json.dumps(document, indent=indent) + "\n/* last */\n"
    try:
        after = merge.merged(text, "json", [Entry(tuple(path), value)])
    except merge.Conflict:
        return
    assert after.startswith("// first\n")
    assert after.endswith("\n/* last */\n")
    assert jsonc.read(after).value == merge.apply(document, [Entry(tuple(path), value)])

"""The agent's configuration: its keys are ngrok's, its conditions let the right requests through."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import celpy
import pytest
import yaml
from hostler.config import HostlerConfig

from gateway.multipart import MAX_FILE_BYTES
from tests.checks.tree import ROOT

from . import tools

FILE = ROOT / "deploy" / "ngrok" / "ngrok.yml"
CONFIG: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
(ENDPOINT,) = CONFIG["endpoints"]
RULES: list[dict[str, Any]] = ENDPOINT["traffic_policy"]["on_http_request"]

# https://ngrok.com/docs/agent/config/v3 and https://ngrok.com/docs/traffic-policy/actions, as of 2026-08.
AGENT_KEYS = {
    *("api_key", "authtoken", "connect_cas", "connect_interface", "connect_timeout", "connect_url", "console_ui"),
    *("console_ui_color", "crl_noverify", "dns_resolver_ips", "heartbeat_interval", "heartbeat_tolerance"),
    *("inspect_db_size", "log_level", "log_format", "log", "metadata", "proxy_url", "remote_management"),
    *("update_channel", "update_check", "web_addr", "web_allow_hosts"),
}
ENDPOINT_KEYS = {"name", "url", "bindings", "metadata", "description", "traffic_policy", "upstream"}
ACTION_KEYS = {
    "custom-response": {"status_code", "headers", "body"},
    "deny": {"status_code"},
    "rate-limit": {"name", "enforce", "algorithm", "capacity", "rate", "bucket_key"},
}


def test_every_key_is_one_of_ngroks() -> None:
    assert set(CONFIG) == {"version", "agent", "endpoints"}
    assert CONFIG["version"] == 3
    assert set(CONFIG["agent"]) <= AGENT_KEYS
    assert set(ENDPOINT) <= ENDPOINT_KEYS
    assert set(ENDPOINT["traffic_policy"]) == {"on_http_request"}  # Replies pass untouched.
    for rule in RULES:
        assert set(rule) <= {"name", "expressions", "actions"}
        for action in rule["actions"]:
            assert set(action["config"]) <= ACTION_KEYS[action["type"]]


def test_ngroks_own_checker_takes_it() -> None:
    command = [tools.find("ngrok"), "config", "check", "--config", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_no_token_in_it_and_no_request_is_kept() -> None:
    assert not {"authtoken", "api_key"} & set(CONFIG["agent"])
    assert CONFIG["agent"]["inspect_db_size"] == -1
    assert CONFIG["agent"]["web_addr"] is False


def test_it_leads_to_the_public_port_as_it_is_by_default() -> None:
    config = HostlerConfig()
    assert ENDPOINT["upstream"]["url"] == f"http://{config.public.host}:{config.port + 1}"


def answer(method: str, path: str, headers: tuple[str, ...], num_bytes: int = 0) -> Any:
    """Return the action of the first rule that stops this request, or None if it comes through."""
    environment = celpy.Environment()
    request = {
        "method": method,
        "url": {"path": path},
        "headers": {name: ["x"] for name in headers},
        "content_length": num_bytes,
    }
    for rule in RULES:
        programs = [environment.program(environment.compile(text)) for text in rule.get("expressions", ())]
        if all(bool(program.evaluate({"req": celpy.json_to_cel(request)})) for program in programs):
            (action,) = rule["actions"]
            return None if action["type"] == "rate-limit" else action["config"]
    return None


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_whoever_brings_a_key_comes_through(header: str) -> None:
    assert answer("POST", "/v1/chat/completions", (header,)) is None
    assert answer("POST", "/v1/audio/transcriptions", (header,), MAX_FILE_BYTES + 2**16) is None


@pytest.mark.parametrize(("method", "path"), [("OPTIONS", "/v1/chat/completions"), ("GET", "/health")])
def test_what_is_asked_without_a_key_comes_through(method: str, path: str) -> None:
    assert answer(method, path, ()) is None


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/")])
def test_without_a_key_the_answer_is_a_401_in_the_shape_of_hostlers(method: str, path: str) -> None:
    config = answer(method, path, ("user-agent",))
    assert config["status_code"] == 401
    error = json.loads(config["body"])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_api_key"


def test_what_is_too_large_for_hostler_is_a_413() -> None:
    assert answer("POST", "/v1/audio/transcriptions", ("authorization",), 40_000_000)["status_code"] == 413


def test_a_minute_is_a_time_that_ngrok_takes() -> None:
    (config,) = [rule["actions"][0]["config"] for rule in RULES if rule["actions"][0]["type"] == "rate-limit"]
    assert config["algorithm"] == "sliding_window"
    assert int(config["rate"].removesuffix("s")) >= 60
    assert 1 <= config["capacity"] <= 2_000_000_000

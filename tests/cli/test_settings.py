"""What the flags, the file and a positional MODEL amount to."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostler.config import (
    DEFAULT_MODEL,
    ConfigError,
    DeviceConfig,
    HostlerConfig,
    McpServerConfig,
    ModelConfig,
    PublicConfig,
    build,
)

from cli import settings
from cli.exits import UsageError
from cli.settings import Flags, without_secrets

EXAMPLE = Path(__file__).resolve().parents[2] / "hostler.example.yaml"


def resolve(**flags: Any) -> HostlerConfig:
    return settings.resolve(Flags(**flags), environ={})[0]


def test_without_any_model_the_default_one_is_preloaded() -> None:
    (model,) = resolve().models
    assert (model.name, model.preload) == (DEFAULT_MODEL, True)


def test_a_hub_id_is_served_under_its_last_part_and_its_whole() -> None:
    (model,) = resolve(models=("Qwen/Qwen3-0.6B@abc123",)).models
    assert (model.name, model.aliases, model.source) == ("Qwen3-0.6B", ("Qwen/Qwen3-0.6B",), "Qwen/Qwen3-0.6B")
    assert (model.revision, model.preload) == ("abc123", True)


def test_two_hub_ids_with_one_last_part_keep_apart() -> None:
    first, second = resolve(models=("a/model", "b/model")).models
    assert (first.name, second.name) == ("model", "b/model")


def test_a_directory_is_named_after_itself_and_made_absolute(place: Path) -> None:
    (place / "my model").mkdir()
    (model,) = resolve(models=("./my model",)).models
    assert (model.name, model.source) == ("my-model", str(place / "my model"))


@pytest.mark.parametrize("suffix", [".gguf", ".onnx"])
def test_a_file_is_named_without_its_suffix(place: Path, suffix: str) -> None:
    (place / f"tiny-q4{suffix}").touch()
    (model,) = resolve(models=(f"tiny-q4{suffix}",)).models
    assert (model.name, model.source) == ("tiny-q4", str(place / f"tiny-q4{suffix}"))


def test_a_folder_of_a_repository_is_named_after_its_last_two_parts() -> None:
    source = "rhasspy/piper-voices/en/en_US/lessac/medium"
    (model,) = resolve(models=(f"{source}@v1",)).models
    assert (model.name, model.source, model.aliases) == ("lessac-medium", source, (source,))
    assert model.revision == "v1"


def test_a_directory_with_a_model_beats_a_hub_id_of_that_name(place: Path) -> None:
    (place / "org" / "model").mkdir(parents=True)
    (place / "org" / "model" / "config.json").touch()
    assert resolve(models=("org/model",)).models[0].source == str(place / "org" / "model")


@pytest.mark.parametrize("text", ["./missing", "missing.gguf", "two words", "a//c", "a/b/../c", ""])
def test_a_model_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        resolve(models=(text,))


def test_models_of_the_file_are_not_forced_to_load(place: Path) -> None:
    (place / "hostler.yaml").write_text("models: [{name: a}, {name: b}]")
    assert [model.preload for model in resolve().models] == [False, False]


def test_a_positional_that_the_file_knows_loads_that_one(place: Path) -> None:
    (place / "hostler.yaml").write_text("models: [{name: a, max_running: 3}, {name: b, aliases: [c]}]")
    models = resolve(models=("a", "c")).models
    assert [(model.name, model.preload, model.max_running) for model in models] == [("a", True, 3), ("b", True, 16)]


def test_a_source_in_the_file_is_relative_to_the_file(place: Path) -> None:
    (place / "etc").mkdir()
    (place / "etc" / "h.yaml").write_text("models: [{name: a, source: ./a}]")
    assert resolve(config=Path("etc/h.yaml")).models[0].source == str(place / "etc" / "a")


def test_the_working_directory_s_file_comes_before_the_user_s(place: Path) -> None:
    user = place / "home" / ".config" / "hostler"
    user.mkdir(parents=True)
    (user / "hostler.yaml").write_text("port: 9001")
    assert resolve().port == 9001
    (place / "hostler.yaml").write_text("port: 9002")
    assert resolve().port == 9002
    assert resolve(port=9003).port == 9003


def test_devices_from_flags() -> None:
    devices = resolve(devices=("cpu0=2GiB", "cuda:1")).devices
    assert [(d.id, d.kind, d.budget) for d in devices] == [("cpu0", "cpu", 2**31), ("cuda:1", "cuda", 0)]


def test_a_bad_size_is_named() -> None:
    with pytest.raises(ConfigError, match="'lots' is not a size"):
        resolve(devices=("cpu0=lots",))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_host_that_others_can_reach_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="openssl rand -hex 32"):
        resolve(host=host)
    assert resolve(host=host, api_key="x" * 32).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_key(host: str) -> None:
    assert resolve(host=host).api_key is None


def test_web_pages_need_a_key() -> None:
    with pytest.raises(UsageError, match="--cors"):
        resolve(cors=("https://x.example",))


@pytest.mark.parametrize(("cores", "gateways"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4), (128, 4)])
def test_gateways_by_cores(cores: int, gateways: int) -> None:
    assert settings.default_gateways(cores) == gateways


def test_the_example_loads_and_opens_no_door() -> None:
    config = resolve(config=EXAMPLE)
    assert config.models[0].name == DEFAULT_MODEL
    assert config.max_body == 8 * 10**6


def test_the_example_shows_and_explains_every_key() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert values.keys() == HostlerConfig.model_fields.keys()
    assert {key for model in values["models"] for key in model} == ModelConfig.model_fields.keys()
    assert values["public"].keys() == PublicConfig.model_fields.keys()
    assert {key for device in values["devices"] for key in device} == DeviceConfig.model_fields.keys()
    assert {key for server in values["mcp_servers"].values() for key in server} == McpServerConfig.model_fields.keys()
    lines = text.splitlines()
    bare = [
        line
        for before, line in itertools.pairwise(lines)
        if re.match(r"\s*(- )?[a-z_]+:", line)
        and not before.lstrip().startswith("#")
        and line.strip() != "- name: coder"
    ]
    assert bare == []


def test_quantization_is_one_of_two_or_none(place: Path) -> None:
    (place / "hostler.yaml").write_text("models: [{name: a, quantize: int8}, {name: b, quantize: null}, {name: c}]")
    assert [model.quantize for model in resolve().models] == ["int8", None, None]
    (place / "hostler.yaml").write_text("models: [{name: a, quantize: int3}]")
    with pytest.raises(ConfigError, match=r"models\.0\.quantize: .*'int8' or 'int4'"):
        resolve()


def test_beams_are_one_to_sixteen(place: Path) -> None:
    (place / "hostler.yaml").write_text("models: [{name: a, beams: 16}, {name: b}]")
    assert [model.beams for model in resolve().models] == [16, 1]
    for beams in (0, 17):
        (place / "hostler.yaml").write_text(f"models: [{{name: a, beams: {beams}}}]")
        with pytest.raises(ConfigError, match=r"models\.0\.beams"):
            resolve()
    (place / "hostler.yaml").write_text("models: [{name: a, engine: transcription, beams: 5}]")
    assert resolve().models[0].beams == 5
    (place / "hostler.yaml").write_text("models: [{name: a, engine: speech, beams: 5}]")
    with pytest.raises(ConfigError, match=r"models\.0: .*beams are .* the engine is speech"):
        resolve()


def test_an_editor_is_told_the_quantizations() -> None:
    kinds = ModelConfig.model_json_schema()["properties"]["quantize"]["anyOf"]
    assert {"enum": ["int8", "int4"], "type": "string"} in kinds


def test_an_editor_may_take_a_size_for_a_number_or_a_text() -> None:
    kinds = ModelConfig.model_json_schema()["properties"]["kv_cache"]["anyOf"]
    assert {kind["type"] for kind in kinds} == {"integer", "string"}


def adapter(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    return directory


def test_an_adapter_in_the_file_is_relative_to_the_file(place: Path) -> None:
    adapter(place / "etc" / "lora")
    (place / "etc" / "h.yaml").write_text("models: [{name: a, adapters: {bot: ./lora}}]")
    assert resolve(config=Path("etc/h.yaml")).models[0].adapters == {"bot": str(place / "etc" / "lora")}


def test_a_directory_without_an_adapter_stops_the_start(place: Path) -> None:
    (place / "hostler.yaml").write_text("models: [{name: a, adapters: {bot: ./lora}}]")
    with pytest.raises(UsageError, match=r"adapter bot: \./lora .* adapter_config\.json"):
        resolve()


def test_an_adapter_s_name_is_nobody_else_s(place: Path) -> None:
    adapter(place / "lora")
    for models in ("{name: a, adapters: {a: lora}}", "{name: a, adapters: {b: lora}}, {name: c, aliases: [b]}"):
        (place / "hostler.yaml").write_text(f"models: [{models}]")
        with pytest.raises(ConfigError, match="is used twice"):
            resolve()


def test_a_bad_adapter_name_and_an_adapter_of_no_weights_are_refused(place: Path) -> None:
    for model in ("{name: a, adapters: {'two words': lora}}", "{name: a, engine: scripted, adapters: {b: lora}}"):
        (place / "hostler.yaml").write_text(f"models: [{model}]")
        with pytest.raises(ConfigError, match=r"not a model name|scripted"):
            resolve()


def test_a_positional_that_means_an_adapter_loads_its_model(place: Path) -> None:
    adapter(place / "lora")
    (place / "hostler.yaml").write_text("models: [{name: a, adapters: {bot: lora}}, {name: b}]")
    assert [(model.name, model.preload) for model in resolve(models=("bot",)).models] == [("a", True), ("b", False)]


def test_what_goes_to_mcp_servers_is_not_shown() -> None:
    servers = {
        "a": {"command": ["x"], "env": {"TOKEN": "sesame-1"}},
        "b": {"url": "https://b.example/", "headers": {"Authorization": "sesame-2"}},
    }
    config = HostlerConfig.model_validate({"api_key": "sesame-30", "mcp_servers": servers})
    shown = str(without_secrets(config.model_dump(mode="json")))
    assert "sesame" not in shown
    assert "'TOKEN': '(set)'" in shown


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({}, "needs either a command or a url"),
        ({"command": ["x"], "url": "https://a.example/"}, "needs either a command or a url"),
        ({"command": ["x"], "headers": {"A": "b"}}, "headers is not for a server with a command"),
        ({"url": "https://a.example/", "env": {"A": "b"}}, "env is not for a server with a url"),
        ({"url": "file:///etc/passwd"}, "mcp_servers.a.url"),
        ({"comand": ["x"]}, "did you mean 'command'"),
    ],
)
def test_a_malformed_mcp_server_stops_the_start(server: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build({"mcp_servers": {"a": server}})

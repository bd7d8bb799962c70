"""The configuration: one frozen object, read once by `hostler serve` and handed to every process.

Sources, later wins: defaults, `hostler.yaml`, `HOSTLER_*` environment variables, command-line flags.
Unknown keys stop the start and name the nearest valid one. `hostler.example.yaml` shows every key.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PORT = 8000

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key and what to write instead."""


def parse_bytes(value: Any) -> Any:
    """Turn "2GiB", "500 MB" or a number into bytes; leave anything else for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(digits) :].strip().upper()
    try:
        return int(float(digits) * _UNITS[unit])
    except (KeyError, ValueError):
        raise ValueError(f"{value!r} is not a size; write it like 2GiB or 500MB") from None


_TIME_UNITS = {"": 1.0, "MS": 0.001, "S": 1.0, "M": 60.0, "MIN": 60.0, "H": 3600.0, "D": 86400.0}


def parse_seconds(value: Any) -> Any:
    """Turn "90s", "10m" or "1.5 h" into seconds; leave anything else for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    try:
        return float(digits) * _TIME_UNITS[text[len(digits) :].strip().upper()]
    except (KeyError, ValueError):
        raise ValueError(f"{value!r} is not a time; write it like 30s, 10m or 1.5h") from None


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@,*]+")


def _origin(value: str) -> str:
    """Return what browsers send as Origin; they compare it letter by letter."""
    text = value.strip().lower()
    if text not in ("*", "null") and not _ORIGIN.fullmatch(text):
        raise ValueError(f"{value!r} is not an origin; write it like https://chat.example.org, without a path, or '*'")
    return text


def _no_path(value: str) -> str:
    if not value or len(value) > 200 or any(c.isspace() or not c.isprintable() for c in value) or ".." in value:
        raise ValueError(f"{value!r} is not a model name; use letters, digits and . _ - : @ /")
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=int | str), Field(ge=0, le=2**60)]
Seconds = Annotated[float, BeforeValidator(parse_seconds, json_schema_input_type=float | str), Field(ge=0, le=10**8)]
ModelName = Annotated[str, AfterValidator(_no_path)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Strict):
    """One model that can be served."""

    name: ModelName = Field(description="Name that clients ask for.")
    source: str = Field(
        default="",
        description="Catalog name, Hub id (org/name), local directory, .gguf or .onnx file; default: the name.",
    )
    revision: str | None = Field(default=None, description="Hub revision (branch, tag or commit); pinned once pulled.")
    aliases: tuple[ModelName, ...] = Field(default=(), description="Other names that mean this model.")
    adapters: dict[ModelName, str] = Field(
        default_factory=dict,
        description="LoRA adapters served beside the model: name that clients ask for, directory that peft wrote.",
    )
    engine: Literal["auto", "text", "embedding", "rerank", "transcription", "speech", "scripted"] = Field(
        default="auto", description="Which engine runs it; auto: what its files are for."
    )
    device: str | None = Field(default=None, description="Pin to one device id, e.g. cuda:1 or cpu.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(default="auto")
    quantize: Literal["int8", "int4"] | None = Field(
        default=None, description="Weights of linear layers as int8 or int4, less memory and precision; null: as dtype."
    )
    max_context_tokens: int = Field(default=0, ge=0, le=10_000_000, description="0: the model's own.")
    max_running: int = Field(default=16, ge=1, le=4096, description="Requests in one batch.")
    max_queued: int = Field(default=256, ge=0, le=100_000, description="Requests that may wait beyond those.")
    kv_cache: Bytes = Field(default=0, description="Bytes the KV cache may grow to; 0: chosen from the device.")
    prefill_chunk_tokens: int = Field(
        default=768,
        ge=16,
        le=65536,
        description="Most prompt tokens of one step; the engine takes fewer while others stream.",
    )
    beams: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Of speech recognition: how many ways to write speech down are followed at once; 1: greedy.",
    )
    num_threads: int = Field(default=0, ge=0, le=1024, description="CPU threads; 0: chosen.")
    preload: bool = Field(default=False, description="Load at start.")
    pinned: bool = Field(default=False, description="Never evict.")
    keep_alive: Seconds | None = Field(
        default=None, description="Idle for so long it goes to sleep, and later for good; null: until room is needed."
    )
    priority: Literal["interactive", "batch"] = Field(
        default="interactive", description="batch: never displaces models that people wait for."
    )
    group: str = Field(default="", max_length=64, description="Name of a group in `apart`.")
    max_replicas: int = Field(default=1, ge=1, le=64, description="Copies that a busy model may have, in free room.")
    max_devices: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Devices that it may be split over if one is too small; 0: as many as needed.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code from the model repository.")

    @model_validator(mode="after")
    def _options_suit_the_engine(self) -> ModelConfig:
        if self.adapters and self.engine == "scripted":
            raise ValueError("the scripted engine has no weights that adapters could add to")
        if self.beams > 1 and self.engine not in ("auto", "transcription"):
            raise ValueError(f"beams are for models that write speech down, and the engine is {self.engine}")
        return self


class DeviceConfig(_Strict):
    """One device, real or virtual. Those of one machine replace what would be discovered there."""

    id: str = Field(
        pattern=r"^([a-z0-9][a-z0-9._-]*/)?[a-z]+[a-z0-9]*(:\d+)?$",
        description="cuda:0, cpu, or any name for a virtual one; of another machine with its name: box2/cuda:0.",
    )
    kind: Literal["cpu", "cuda"] = "cpu"
    budget: Bytes = Field(default=0, description="Bytes hostler may use on it; 0: what is free at start.")


_ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
EnvName = Annotated[str, Field(pattern=_ENV_NAME, max_length=256)]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$", max_length=256)]
HeaderValue = Annotated[str, Field(pattern=r"^[^\r\n\x00]*$", max_length=16384)]


class McpServerConfig(_Strict):
    """One MCP server whose tools models may call: a command that speaks over its standard streams, or a URL.

    `${NAME}` in a value of `env` or `headers` stands for that environment variable of `hostler serve`.
    """

    command: tuple[str, ...] = Field(
        default=(), max_length=256, description="Program and arguments, run without a shell; it speaks over stdio."
    )
    env: dict[EnvName, str] = Field(default_factory=dict, description="Variables to set for the command.")
    pass_env: tuple[EnvName, ...] = Field(
        default=(), description="Variables of `hostler serve` that the command may see; beyond PATH and HOME none is."
    )
    cwd: Path | None = Field(default=None, description="Where the command runs; null: the user's home.")
    url: str = Field(
        default="", pattern=r"^(https?://[^\s]+)?$", max_length=4096, description="Its address, instead of a command."
    )
    transport: Literal["auto", "http", "sse"] = Field(
        default="auto", description="http: streamable HTTP; sse: the older way; auto: tried in this order."
    )
    headers: dict[HeaderName, HeaderValue] = Field(default_factory=dict, description="Sent to the URL.")
    tools: tuple[str, ...] | None = Field(default=None, description="The only tools that may be called; null: all.")
    chat: bool = Field(default=False, description="Give its tools to every chat completion, without being asked.")
    timeout: Seconds = Field(default=60.0, gt=0, description="Longest wait for one call.")
    start_timeout: Seconds = Field(default=60.0, gt=0, description="Longest wait for it to start and list its tools.")
    max_result: Bytes = Field(default=10**6, ge=1024, description="Most bytes that it may send for one call.")

    @model_validator(mode="after")
    def _is_one_of_two(self) -> McpServerConfig:
        if bool(self.command) == bool(self.url):
            raise ValueError("needs either a command or a url")
        wrong = {"env": self.env, "pass_env": self.pass_env, "cwd": self.cwd} if self.url else {"headers": self.headers}
        for key, value in wrong.items():
            if value:
                raise ValueError(f"{key} is not for a server with a {'url' if self.url else 'command'}")
        return self


class PublicConfig(_Strict):
    """A second application for a tunnel or reverse proxy: the models' API alone, and never without a key."""

    enabled: bool = Field(default=False, description="Listen for a tunnel or proxy, too.")
    host: str = Field(default="127.0.0.1", description="Address that the proxy connects to.")
    port: int = Field(default=0, ge=0, le=65535, description="0: the server's port + 1.")
    hosts: tuple[str, ...] = Field(default=(), description="Names that Host may carry; a tunnel's is known by itself.")
    url: str = Field(
        default="", pattern=r"^(https?://[^\s/?#@]+/?)?$", max_length=512, description="Where others reach it."
    )
    cors: tuple[Annotated[str, AfterValidator(_origin)], ...] = Field(
        default=(), description="Origins allowed from browsers, or '*'."
    )
    fetch_urls: bool = Field(
        default=False, description="Fetch images, and call MCP servers if mcp_urls is on, by addresses of requests."
    )
    ngrok: bool = Field(default=False, description="Open a tunnel with ngrok; pip install 'hostler[ngrok]'.")
    domain: str = Field(default="", max_length=253, description="The tunnel's name; empty: ngrok chooses.")


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class HostlerConfig(_Strict):
    """Everything that `hostler serve` needs to know."""

    host: str = Field(default="127.0.0.1", description="Address to listen on. Anything but loopback needs an API key.")
    port: int = Field(default=DEFAULT_PORT, ge=1, le=65535)
    api_key: str | None = Field(default=None, min_length=8, max_length=512, description="Bearer key that clients send.")
    keys_file: Path | None = Field(
        default=None, description="Keys made by `hostler key create`; null: ~/.config/hostler/keys.json."
    )
    require_key: bool = Field(default=False, description="Demand a key on loopback, too.")
    cors: tuple[Annotated[str, AfterValidator(_origin)], ...] = Field(
        default=(), description="Origins allowed from browsers, or '*'."
    )
    allowed_hosts: tuple[str, ...] = Field(default=(), description="Host headers to accept beyond loopback names.")
    gateways: int = Field(default=0, ge=0, le=64, description="Gateway processes; 0: chosen from the cores.")
    max_body: Bytes = Field(default=8 * 10**6, description="Largest JSON body.")
    fetch_urls: bool = Field(default=False, description="Fetch images that requests give by http(s) address.")
    responses_dir: Path | None = Field(
        default=None, description="Where stored responses lie; null: the run directory, which may not outlive a reboot."
    )
    responses_max_count: int = Field(
        default=10_000, ge=0, le=10**8, description="Stored responses and conversations; 0: none is stored."
    )
    responses_max_bytes: Bytes = Field(default=256 * 10**6, description="Bytes of all of them; 0: none is stored.")
    responses_max_age: Seconds = Field(default=30 * 86400.0, description="Kept for so long after their last use.")
    mcp_servers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], McpServerConfig] = Field(
        default_factory=dict, description="MCP servers whose tools models may call, by name."
    )
    mcp_urls: bool = Field(
        default=False, description="Let requests name MCP servers by public http(s) address, beyond those above."
    )
    public: PublicConfig = Field(default_factory=PublicConfig)
    models: tuple[ModelConfig, ...] = Field(default=())
    devices: tuple[DeviceConfig, ...] = Field(default=())
    models_dir: Path | None = Field(default=None, description="Where pulled models live; default ~/.cache/hostler.")
    ray_address: str | None = Field(default=None, description="Join this Ray cluster instead of starting one.")
    sleep_memory: Bytes | None = Field(
        default=None, description="Host memory for sleeping models; 0: none sleeps; null: chosen from what is free."
    )
    warm_workers: int = Field(
        default=1, ge=0, le=16, description="Blank worker processes kept ready, so loads are quick."
    )
    min_residency: Seconds = Field(default=5.0, description="A model that was just loaded stays at least so long.")
    max_wait: Seconds = Field(
        default=30.0,
        description="Who waits longer for memory gets a turn: a busy model takes no new requests meanwhile.",
    )
    apart: tuple[str, ...] = Field(default=(), description="Groups whose models may not share a device.")
    step_budget_s: float = Field(default=60.0, gt=0, le=3600, description="A busy worker that takes longer is hung.")
    drain_s: float = Field(default=20.0, ge=0, le=3600, description="How long a stop waits for running requests.")
    reload_drain: Seconds = Field(
        default=3600.0, description="How long requests that run when the configuration is reloaded may go on."
    )

    @property
    def demands_key(self) -> bool:
        """Whether callers of the local application need an API key."""
        return self.require_key or self.api_key is not None or not is_loopback(self.host)

    @model_validator(mode="after")
    def _names_are_unique(self) -> HostlerConfig:
        seen: set[str] = set()
        for model in self.models:
            for name in (model.name, *model.aliases, *model.adapters):
                if name in seen:
                    raise ValueError(f"model name {name!r} is used twice")
                seen.add(name)
        return self


ENV_PREFIX = "HOSTLER_"
_ENV_OPTIONS = ("host", "port", "api_key", "cors", "gateways", "models_dir", "ray_address")


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in _ENV_OPTIONS:
        if (text := environ.get(ENV_PREFIX + option.upper())) is not None:
            values[option] = tuple(text.split(",")) if option == "cors" else text
    return values


_PARTS: dict[str, type[BaseModel]] = {"models": ModelConfig, "devices": DeviceConfig, "mcp_servers": McpServerConfig}


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "the file"
        if item["type"] != "extra_forbidden":
            lines.append(f"{where}: {item['msg']}")
            continue
        owner: type[BaseModel] = HostlerConfig
        if len(item["loc"]) > 1:
            owner = PublicConfig if item["loc"][0] == "public" else _PARTS.get(str(item["loc"][0]), HostlerConfig)
        near = difflib.get_close_matches(str(item["loc"][-1]), owner.model_fields, n=1, cutoff=0.4)
        lines.append(f"{where}: unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
    return "\n".join(lines)


def build(values: Mapping[str, Any]) -> HostlerConfig:
    """Validate plain values.

    Raises:
        ConfigError: with one line for each fault.
    """
    try:
        return HostlerConfig.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def load(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> HostlerConfig:
    """Read the file (if any), the environment and the overrides (command-line flags), in that order.

    Raises:
        ConfigError: unreadable, malformed, unknown key or bad value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        if document is not None and not isinstance(document, dict):
            raise ConfigError(f"{path}: the top level must be keys and values")
        values.update(document or {})
    values.update(_from_environment(os.environ if environ is None else environ))
    values.update(overrides or {})
    return build(values)


def read_resolved(path: Path) -> HostlerConfig:
    """Read what `write_resolved` wrote; for the processes that `hostler serve` starts."""
    return build(json.loads(path.read_text(encoding="utf-8")))


def stamp_of(path: Path) -> str:
    """Return what tells the present resolved configuration from those before; empty if there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_ino}-{found.st_mtime_ns}"


def write_resolved(config: HostlerConfig, path: Path) -> None:
    """Replace the resolved configuration by this one, readable by this user alone (it may hold the API key)."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(config.model_dump_json())
    draft.replace(path)

"""From command-line flags, the environment and hostler.yaml to the one frozen configuration of a server.

Above stands `cli.serve`; below, `hostler.config`, which validates. What is decided here: which file is read,
what a positional MODEL means, which models load at start, and who may be let in without a key.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostler import config as configuration
from hostler.config import DEFAULT_MODEL, HostlerConfig

from cli.exits import UsageError

_PART = r"[A-Za-z0-9][\w.-]*"
# An organisation, a repository, perhaps a folder of it, perhaps a revision.
_HUB_ID = re.compile(rf"{_PART}/[\w.-]+(/{_PART}){{0,8}}(@[\w./-]+)?")
_FILES = (".gguf", ".onnx")
CREATE_A_KEY = "hostler key create laptop"
MAKE_A_KEY = '--api-key "$(openssl rand -hex 32)"'


@dataclass(frozen=True, slots=True)
class Flags:
    """What stood on the command line of `hostler serve`; None or empty: not given."""

    models: tuple[str, ...] = ()
    host: str | None = None
    port: int | None = None
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    config: Path | None = None
    gateways: int | None = None
    models_dir: Path | None = None
    devices: tuple[str, ...] = ()
    ray_address: str | None = None
    public: bool = False
    public_host: tuple[str, ...] = ()
    public_port: int | None = None
    public_url: str | None = None
    ngrok: bool = False
    domain: str | None = None


def find_file(given: Path | None, environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the configuration file to read: the given one, ./hostler.yaml, the user's, or none."""
    if given is not None:
        return given
    environ = os.environ if environ is None else environ
    user = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hostler" / "hostler.yaml"
    for path in (Path("hostler.yaml"), user):
        if path.is_file():
            return path
    return None


def _looks_local(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..") or text.endswith(_FILES)


def _local_source(text: str, base: Path) -> Path | None:
    """Return the absolute path if `text` means a file or directory, else None."""
    path = base / Path(text).expanduser()
    if _looks_local(text):
        return path.resolve()
    if "/" in text and path.is_dir() and (path / "config.json").is_file():
        return path.resolve()
    return None


def _adapter(name: str, text: str, base: Path) -> str:
    """Return the absolute path of an adapter's directory.

    Raises:
        UsageError: there is no adapter in it.
    """
    directory = (base / Path(text).expanduser()).resolve()
    if not (directory / "adapter_config.json").is_file():
        raise UsageError(f"adapter {name}: {text} is not a directory with an adapter_config.json, as peft writes it")
    return str(directory)


def read_model(text: str) -> dict[str, Any]:
    """Return the model entry that a positional argument means.

    A path (or an existing directory) is named after its last part; a Hub id after its last part (a folder after its
    last two), with the whole id as an alias; `id@revision` pins a revision; anything else is a catalog name.

    Raises:
        UsageError: a path that does not exist, or a name with spaces.
    """
    local = _local_source(text, Path.cwd())
    if local is not None:
        if not local.exists():
            raise UsageError(f"{text}: no such file or directory")
        stem = local.stem if local.suffix in _FILES else local.name
        return {"name": re.sub(r"[^\w.:@-]+", "-", stem), "source": str(local), "preload": True}
    if _HUB_ID.fullmatch(text):
        identity, _, revision = text.partition("@")
        # Of a folder the last two names: en/en_US/lessac/medium is called lessac-medium.
        name = "-".join(identity.split("/")[1:][-2:]) if identity.count("/") > 1 else identity.split("/")[1]
        entry: dict[str, Any] = {"name": name, "source": identity, "aliases": (identity,)}
        if revision:
            entry["revision"] = revision
        return entry | {"preload": True}
    if "/" in text or not text or any(c.isspace() for c in text):
        raise UsageError(
            f"{text!r} is not a model; give a catalog name, a Hub id (org/name), a directory, a .gguf or .onnx file"
        )
    return {"name": text, "preload": True}


def _add(models: list[dict[str, Any]], text: str) -> None:
    """Add what a positional argument means, or mark the configured model that it means for loading."""
    for model in models:
        if text in (model["name"], model.get("source"), *model.get("aliases", ()), *model.get("adapters", ())):
            model["preload"] = True
            return
    entry = read_model(text)
    for model in models:
        if (model.get("source") or model["name"]) == (entry.get("source") or entry["name"]):
            model["preload"] = True
            return
    taken = {n for m in models for n in (m["name"], *m.get("aliases", ()), *m.get("adapters", ()))}
    aliases = tuple(alias for alias in entry.get("aliases", ()) if alias not in taken)
    if entry["name"] in taken:
        # Another model has the short name: the whole id, or the directory's parent, tells them apart.
        source = Path(entry.get("source", entry["name"]))
        entry["name"] = aliases[0] if aliases else f"{source.parent.name}-{entry['name']}"
        aliases = ()
    models.append(entry | {"aliases": aliases})


def read_device(text: str) -> dict[str, Any]:
    """Return the device entry for `ID` or `ID=SIZE`, e.g. cuda:0, cpu=8GiB, box2/cpu0=2GiB."""
    identity, _, budget = text.partition("=")
    is_gpu = identity.rpartition("/")[2].startswith("cuda")
    entry: dict[str, Any] = {"id": identity, "kind": "cuda" if is_gpu else "cpu"}
    return entry | ({"budget": budget} if budget else {})


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refuse_open_door(config: HostlerConfig) -> None:
    """Refuse a server that strangers, or any web page, could use without a key.

    Raises:
        UsageError: says how to make a key.
    """
    if config.api_key:
        return
    from hostler.keys import KeyFile, KeysError

    if config.cors and is_loopback(config.host) and not config.require_key:
        raise UsageError(
            "--cors lets web pages call the server, so it needs an API key. Set `require_key: true` and run"
            f"  {CREATE_A_KEY}  or add:  {MAKE_A_KEY}"
        )
    if is_loopback(config.host) and not config.require_key and not config.public.enabled:
        return
    try:
        keys = KeyFile(config.keys_file).read() if config.keys_file else []
    except KeysError as error:
        raise UsageError(str(error)) from None
    if not any(key.lives(time.time()) for key in keys):
        why = "require_key is set"
        if config.public.enabled:
            why = "--public and --ngrok let others in"
        elif not is_loopback(config.host):
            why = f"listening on {config.host} lets others in"
        raise UsageError(f"{why}, so the server needs an API key. Run:  {CREATE_A_KEY}  or add:  {MAKE_A_KEY}")


def keys_path(config: HostlerConfig, config_file: Path | None) -> Path:
    """Return where the keys lie, absolute; a relative path is beside the configuration file."""
    if config.keys_file is None:
        return default_keys_path().absolute()
    return ((config_file.parent if config_file else Path.cwd()) / config.keys_file.expanduser()).absolute()


def default_keys_path() -> Path:
    """Return where the user's keys lie unless the configuration says otherwise."""
    from hostler.keys import default_path

    return default_path()


def public_settings(values: Mapping[str, Any], flags: Flags, port: int) -> dict[str, Any]:
    """Return the `public` section with the flags, and the port that it will have.

    Raises:
        UsageError: a flag that would be of no effect.
    """
    given = {"port": flags.public_port, "url": flags.public_url, "domain": flags.domain}
    section = {**values, **{key: value for key, value in given.items() if value is not None}}
    section["hosts"] = flags.public_host or section["hosts"]
    section["ngrok"] = section["ngrok"] or flags.ngrok
    section["enabled"] = section["enabled"] or section["ngrok"] or flags.public
    if section["domain"] and not section["ngrok"]:
        raise UsageError("--domain is the name of ngrok's tunnel: add --ngrok, or use --public-url")
    if not section["enabled"] and (flags.public_host or any(value is not None for value in given.values())):
        raise UsageError("--public-host, --public-port and --public-url want --public or --ngrok")
    if section["enabled"] and not (section["ngrok"] or section["url"] or section["hosts"]):
        raise UsageError("--public wants the address that others use. Add:  --public-url https://llm.example.org")
    section["port"] = section["port"] or (port + 1 if port < 65535 else port - 1)
    return section


def default_gateways(cores: int) -> int:
    """Return how many gateway processes suit a machine: one on a small one, at most four."""
    return 1 if cores <= 2 else max(1, min(4, cores // 4))


def resolve(flags: Flags, environ: Mapping[str, str] | None = None) -> tuple[HostlerConfig, Path | None]:
    """Return the configuration to serve with, and the file that it was read from.

    Raises:
        UsageError, ConfigError: one line for each fault.
    """
    path = find_file(flags.config, environ)
    given = {
        "host": flags.host,
        "port": flags.port,
        "api_key": flags.api_key,
        "cors": flags.cors or None,
        "allowed_hosts": flags.allowed_hosts or None,
        "gateways": flags.gateways,
        "models_dir": flags.models_dir,
        "devices": tuple(read_device(text) for text in flags.devices) or None,
        "ray_address": flags.ray_address,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    config = configuration.load(path, overrides, environ)
    values = config.model_dump()
    models = [dict(model) for model in values["models"]]
    for model in models:
        base = path.parent if path else Path.cwd()
        local = _local_source(model["source"], base) if model["source"] else None
        model["source"] = str(local) if local else model["source"]
        model["adapters"] = {name: _adapter(name, text, base) for name, text in model["adapters"].items()}
    for text in flags.models:
        _add(models, text)
    if not models:
        models.append({"name": DEFAULT_MODEL, "preload": True})
    values["models"] = models
    for server in values["mcp_servers"].values():
        if server["cwd"] is not None:
            server["cwd"] = ((path.parent if path else Path.cwd()) / server["cwd"].expanduser()).resolve()
    values["public"] = public_settings(values["public"], flags, config.port)
    values["gateways"] = config.gateways or default_gateways(os.cpu_count() or 1)
    if config.models_dir is not None:
        values["models_dir"] = config.models_dir.expanduser().resolve()
    values["keys_file"] = keys_path(config, path)
    config = configuration.build(values)
    refuse_open_door(config)
    return config, path


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's plain values fit to be shown: keys, and what goes to MCP servers, are not."""
    hidden = {**values, "api_key": "(set)" if values["api_key"] else values["api_key"]}
    hidden["mcp_servers"] = {
        name: {
            **server,
            "env": dict.fromkeys(server["env"], "(set)"),
            "headers": dict.fromkeys(server["headers"], "(set)"),
        }
        for name, server in values["mcp_servers"].items()
    }
    return hidden


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML in their own order."""
    import yaml

    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text

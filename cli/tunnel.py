"""`python -m cli.tunnel --run-dir DIR`: holds ngrok's tunnel to the public socket and tells its address in a file.

Above: `cli.serve`, whose supervisor restarts it with growing pauses; below: ngrok's SDK, the optional extra
`hostler[ngrok]`. The token comes from the environment or from ngrok's own file; it is never an argument of a command,
and never in a log.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import inspect
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hostler.config import HostlerConfig, read_resolved
from hostler.rundir import RunDir

from cli.exits import UsageError

TOKEN = "NGROK_AUTHTOKEN"
OPEN_WITHIN_S = 30.0
_FILES = (".config/ngrok/ngrok.yml", "Library/Application Support/ngrok/ngrok.yml", ".ngrok2/ngrok.yml")


def find_token(environ: Mapping[str, str], home: Path) -> str | None:
    """Return ngrok's token: from the environment, else from the places where `ngrok config add-authtoken` puts it."""
    if token := environ.get(TOKEN, "").strip():
        return token
    import yaml

    for name in _FILES:
        with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
            values = yaml.safe_load((home / name).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                continue
            agent = values.get("agent")
            found = values.get("authtoken") or (agent.get("authtoken") if isinstance(agent, dict) else None)
            if isinstance(found, str) and found.strip():
                return found.strip()
    return None


def refuse_without_ngrok(config: HostlerConfig, environ: Mapping[str, str] | None = None) -> None:
    """Refuse a tunnel that could not be opened, before anything is started.

    Raises:
        UsageError: the SDK or the token is missing; says how to get it.
    """
    if not config.public.ngrok:
        return
    if importlib.util.find_spec("ngrok") is None:
        raise UsageError("--ngrok wants ngrok's SDK. Run:  pip install 'hostler[ngrok]'")
    if find_token(os.environ if environ is None else environ, Path.home()) is None:
        raise UsageError(f"--ngrok wants a token: set {TOKEN}; https://dashboard.ngrok.com shows yours")


def tell(path: Path, url: str) -> None:
    """Write the address, whole or not at all, readable by this user alone."""
    draft = path.with_suffix(".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"url": url}, file)
    draft.replace(path)


def untell(path: Path) -> None:
    """Take the address back: the tunnel is down."""
    path.unlink(missing_ok=True)


def read_url(path: Path) -> str:
    """Return the address that a tunnel has told; empty while none is up."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text(encoding="utf-8"))["url"])
    return ""


async def hold(config: HostlerConfig, path: Path, token: str, stop: asyncio.Event) -> None:
    """Open the tunnel, tell its address, and keep it until `stop`.

    Raises:
        Exception: whatever the SDK raises when ngrok refuses.
        TimeoutError: ngrok does not answer.
    """
    import ngrok

    domain = {"domain": config.public.domain} if config.public.domain else {}
    async with asyncio.timeout(OPEN_WITHIN_S):
        listener: Any = ngrok.forward(f"{config.public.host}:{config.public.port}", authtoken=token, **domain)
        listener = await listener if inspect.isawaitable(listener) else listener
    try:
        tell(path, listener.url())
        await stop.wait()
    finally:
        untell(path)
        await listener.close()


async def _run(config: HostlerConfig, path: Path, token: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await hold(config, path, token, stop)


def main() -> None:
    """Hold the tunnel until SIGTERM; a refusal is one line in the log and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m cli.tunnel", description="The tunnel of a hostler server.")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory with config.json")
    run_dir = RunDir(parser.parse_args().run_dir)
    token = find_token(os.environ, Path.home()) or ""
    try:
        asyncio.run(_run(read_resolved(run_dir.config), run_dir.tunnel, token))
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"no tunnel: {words.replace(token, '(token)') if token else words}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()

"""What `hostler serve --public` prints: the public address, Cursor's settings, and a test through that address.

Above: `cli.startup`; below: `cli.self_test`, `cli.clients` (Cursor's entry) and `cli.tunnel` (where the address is).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

from hostler.config import HostlerConfig
from hostler.keys import KeyFile, KeysError
from hostler.rundir import RunDir

from cli import tunnel
from cli.clients import catalog
from cli.clients.render import KEY_TO_FILL_IN, Target, steps_of
from cli.report import Reporter
from cli.self_test import run

_TUNNEL_WITHIN_S = 60.0
_LOOK_EVERY_S = 0.1
_TEST_KEY_LIVES_S = 900.0
# Gateways look at the key file four times a second.
_KEY_TAKEN_S = 0.6
_ANY_CONTEXT = 8192  # Cursor's steps name no length


async def show_outside(config: HostlerConfig, run_dir: RunDir, models: Sequence[str], report: Reporter) -> None:
    """Print the address and the settings, then test from outside in with the first of `models`, which chat."""
    url = config.public.url.rstrip("/")
    if config.public.ngrok:
        url = await _told(run_dir)
        if not url:
            log = run_dir.logs / "tunnel.log"
            report.say("tunnel_silent", f"✗ the tunnel is not up; see {log}", "bad", path=str(log))
            return
    local = f"{config.public.host}:{config.public.port}"
    if not url:
        hosts = ", ".join(config.public.hosts)
        report.say("public", f"\nPublic on http://{local}/v1 for {hosts}. --public-url has it tested.", "head")
        return
    report.say("public", f"\nPublic on {url}/v1, which leads to {local}: models only, key demanded", "head", url=url)
    if urlsplit(url).scheme != "https":
        report.say("not_secret", "  Without https the key and all prompts can be read on the way.", "warn")
    if not models:
        report.say("untested", "  Not tested: no model that chats is loaded.", "warn")
        return
    target = Target(url, models[0], KEY_TO_FILL_IN, True, _ANY_CONTEXT)
    report.say("cursor", "Cursor:", "dim")
    for step in steps_of(catalog.find("cursor"), target):
        report.say("cursor_step", f"  {step.text}", "dim")
    report.say("self_test", f"Testing through {url} with {models[0]}", url=url, model=models[0])
    async with _key_for_test(config) as key:
        async for check in run(url, models[0], key):
            mark, tone = ("✗", "bad") if check.problem else ("✓", "good")
            text = f"  {mark} {check.name}: {check.problem or check.found}"
            report.say("self_test_step", text, tone, check=check.name, ok=not check.problem)


@asynccontextmanager
async def _key_for_test(config: HostlerConfig) -> AsyncIterator[str]:
    """Yield a key that opens the server: the configured one, or one that is revoked as soon as the test is over."""
    if config.api_key or config.keys_file is None:
        yield config.api_key or ""
        return
    keys = KeyFile(config.keys_file)
    key, text = keys.add(f"self-test-{secrets.token_hex(4)}", lifetime_s=_TEST_KEY_LIVES_S)
    try:
        await asyncio.sleep(_KEY_TAKEN_S)
        yield text
    finally:
        with suppress(KeysError):
            keys.revoke(key.id)


async def _told(run_dir: RunDir) -> str:
    for _ in range(round(_TUNNEL_WITHIN_S / _LOOK_EVERY_S)):
        if url := tunnel.read_url(run_dir.tunnel):
            return url
        await asyncio.sleep(_LOOK_EVERY_S)
    return ""
